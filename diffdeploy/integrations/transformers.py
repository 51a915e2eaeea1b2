"""Model bundles as models of the transformers library, usable wherever the library's ``generate()`` is.

Shape suffixes: B batch, S new tokens, T all tokens so far, V vocabulary.
"""

import json
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers import PreTrainedModel as _PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from diffdeploy.bundle import Bundle
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.runtime import Runtime, eos_of, load

__all__ = ["DiffDeployConfig", "DiffDeployForCausalLM"]

_GENERATION_CONFIG = "generation_config.json"
# The name of the cache in outputs and arguments, which transformers 5.24 changed.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Outputs that callers may request from a model of transformers, but that no graph returns.
_NOT_GIVEN = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")


class DiffDeployConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the model in a bundle, by their names in transformers."""

    model_type = "diffdeploy"

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Create the config of a bundle.

        Raises:
            InputError: the bundle holds a block.
        """
        decoder = bundle.manifest.config
        if not isinstance(decoder, DecoderConfig):
            raise InputError(f"{bundle.path} holds a block, which generates no tokens; export a whole model")
        eos, block = eos_of(bundle), decoder.attention
        config = cls(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.embed_dim,
            num_hidden_layers=decoder.num_layers,
            # Counted as in the cache, since transformers creates its caches from these numbers.
            num_attention_heads=2 * block.num_heads,
            num_key_value_heads=block.num_kv_heads,
            head_dim=block.key_cache_dim,
            max_position_embeddings=bundle.manifest.graph.axes["total_sequence_length"].max,
            eos_token_id=list(eos) if len(eos) > 1 else next(iter(eos), None),
            tie_word_embeddings=decoder.tied,
            dtype=bundle.manifest.graph.dtype,
            architectures=["DiffDeployForCausalLM"],
        )
        config.name_or_path = str(bundle.path)
        return config


class DiffDeployForCausalLM(_PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model bundle of any format, run by `diffdeploy.runtime.Runtime`, with the methods of transformers' models.

    It has no parameters, so it cannot be trained, moved or cast. Caches are of the class `transformers.DynamicCache`.

    Args:
        runtime: runtime of a bundle that holds a whole model.

    Attributes:
        runtime: the runtime that computes logits and caches.

    Raises:
        InputError: the bundle holds a block.
    """

    config_class = DiffDeployConfig
    main_input_name = "input_ids"

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(DiffDeployConfig.of(runtime.bundle))
        self.runtime = runtime
        self.generation_config = _generation_config(runtime.bundle, self.config)

    @classmethod
    def from_bundle(cls, path: str | Path, **options: Any) -> Self:
        """Open a bundle.

        Args:
            path: directory of the bundle.
            **options: options of `diffdeploy.load`, such as ``device`` and ``trust``.

        Raises:
            DiffDeployError: see `diffdeploy.load`; `InputError` for other options, such as those of transformers for
                loading weights, and if the bundle holds a block.
        """
        accepted = [name for name, each in signature(load).parameters.items() if each.kind is each.KEYWORD_ONLY]
        if unknown := sorted(options.keys() - accepted):
            raise InputError(f"{unknown[0]} is not accepted for a bundle; accepted: {', '.join(accepted)}")
        return cls(load(path, **options))

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """Call `from_bundle`; code for transformers uses this name."""
        return cls.from_bundle(path, **options)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise an error, since there are no weights to save.

        Raises:
            InputError: always.
        """
        raise InputError(f"a bundle is saved by copying its directory, {self.runtime.bundle.path}")

    @property
    def device(self) -> torch.device:
        """Device on which the bundle runs."""
        return torch.device(self.runtime.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits and caches."""
        found: torch.dtype = getattr(torch, self.runtime.spec.dtype)
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: DynamicCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, with the arguments of transformers' models.

        Args:
            input_ids: new token ids ``[B, S]``, int64.
            attention_mask: mask ``[B, T]``, 0 for padding; no padding by default.
            position_ids: positions ``[B, S]``; by default those after the cache, regardless of the mask.
            past_key_values: cache of earlier tokens, to which the new ones are added.
            use_cache: true to create a cache if none is given.
            logits_to_keep: number of last positions whose logits are returned; 0 for all.
            return_dict: false to return a tuple.
            cache: ``past_key_values`` under the name that it has had since transformers 5.24.
            **others: other arguments of transformers, which must not change the result.

        Returns:
            ``logits [B, S, V]`` in `dtype`, and the cache.

        Raises:
            InputError: the bundle does not accept the inputs or does not return logits at the requested positions, the
                cache is of another class, or another output is requested.
        """
        for name in _NOT_GIVEN:
            # Compared by identity, since a tensor has no truth value.
            if others.get(name) is not None and others[name] is not False:
                raise InputError(f"{name} is not an input or output of a bundle; omit it")
        if unknown := [name for name, value in others.items() if isinstance(value, Cache)]:
            raise InputError(f"{unknown[0]} is a cache by another name; accepted: past_key_values, cache")
        past_key_values = past_key_values if cache is None else cache
        if input_ids is None:
            raise InputError("input_ids is missing; give int64 [batch, tokens]")
        past_key_values = DynamicCache(config=self.config) if past_key_values is None and use_cache else past_key_values
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = {"input_ids": input_ids, **self._cached(past_key_values, input_ids)}
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.int64, device=input_ids.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        sides = {
            "attention_mask": attention_mask.to(torch.int64),
            "position_ids": position_ids.expand(batch, length).contiguous(),
        }
        given |= {name: side for name, side in sides.items() if name in self.runtime.spec.inputs}
        self._require_logits(logits_to_keep, length)
        outputs = self.runtime(**given)
        self._keep(past_key_values, outputs)
        logits = outputs["logits"][:, -logits_to_keep:] if logits_to_keep else outputs["logits"]
        found = CausalLMOutputWithPast(**{"logits": logits, _CACHE: past_key_values})
        return found.to_tuple() if return_dict is False else found

    def _require_logits(self, wanted: int, length: int) -> None:
        if self.runtime.spec.logits == "last" and (wanted or length) > 1:
            raise InputError(
                f"logits of {wanted or length} positions are requested, but the bundle returns only those of the last; "
                "export with --logits all"
            )

    def _cached(self, cache: DynamicCache | None, input_ids: Tensor) -> dict[str, Tensor]:
        """Inputs of the graph from a cache, by name; empty before the first token."""
        spec, given = self.runtime.spec, {}
        for number, pair in enumerate(self._pairs()):
            layer = _layer(cache, number)
            sides = (None, None) if layer is None or not layer.is_initialized else (layer.keys, layer.values)
            for name, side in zip(pair, sides, strict=True):
                _, heads, _, width = spec.inputs[name].shape
                empty = (len(input_ids), int(heads), 0, int(width))
                given[name] = input_ids.new_empty(empty, dtype=self.dtype) if side is None else side.contiguous()
        return given

    def _keep(self, cache: DynamicCache | None, outputs: dict[str, Tensor]) -> None:
        """Replace the content of a cache with the graph's outputs, which include past and new tokens."""
        if cache is None:
            return
        for number, pair in enumerate(self._pairs()):
            keys, values = (outputs[self.runtime.spec.caches[name]] for name in pair)
            layer = _layer(cache, number)
            assert layer is not None
            if layer.is_initialized:
                # `update` would copy everything once more to append the new tokens to the past.
                layer.keys, layer.values = keys, values
            else:
                layer.update(keys, values)

    def _pairs(self) -> list[tuple[str, str]]:
        """Names of the keys and values of each layer."""
        names = list(self.runtime.spec.caches)
        return list(zip(names[::2], names[1::2], strict=True))


def _layer(cache: DynamicCache | None, number: int) -> DynamicLayer | None:
    """Layer of a cache; layers that it would create on first use are created now.

    Raises:
        InputError: the cache is of another class, such as a static or quantised one.
    """
    if cache is None:
        return None
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(number + 1 - len(cache.layers))]
    # Exactly this class: some of its subclasses hold only a part of the tokens.
    if number >= len(cache.layers) or type(cache.layers[number]) is not DynamicLayer or cache.offloading:
        raise InputError(
            f"the cache is a {type(cache).__name__}, or holds only part of the past; accepted: a whole DynamicCache"
        )
    return cache.layers[number]


def _generation_config(bundle: Bundle, config: DiffDeployConfig) -> GenerationConfig:
    """The checkpoint's settings for generation, with the same end token as in the runtime."""
    found = GenerationConfig()
    if _GENERATION_CONFIG in bundle.manifest.files:
        found = GenerationConfig.from_dict(json.loads((bundle.path / _GENERATION_CONFIG).read_text(encoding="utf-8")))
    found.eos_token_id = config.eos_token_id
    return found


# Pipelines look up accepted models here.
AutoConfig.register(DiffDeployConfig.model_type, DiffDeployConfig, exist_ok=True)
AutoModelForCausalLM.register(DiffDeployConfig, DiffDeployForCausalLM, exist_ok=True)
