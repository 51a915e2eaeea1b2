"""Model bundles as models of transformers, so that everything that builds on its ``generate()`` works on them.

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
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from diffdeploy.bundle import Bundle
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.runtime import Runtime, eos_of, load

__all__ = ["DiffDeployConfig", "DiffDeployForCausalLM"]

_GENERATION_CONFIG = "generation_config.json"
# What callers may ask of a model of transformers, and no graph gives.
_NOT_GIVEN = ("inputs_embeds", "labels", "output_attentions", "output_hidden_states")


class DiffDeployConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the model in a bundle, by the names of transformers."""

    model_type = "diffdeploy"

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The config of a bundle.

        Raises:
            InputError: it holds a block.
        """
        decoder = bundle.manifest.config
        if not isinstance(decoder, DecoderConfig):
            raise InputError(f"{bundle.path} holds a block, which gives no tokens; export a whole model")
        eos, block = eos_of(bundle), decoder.attention
        config = cls(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.embed_dim,
            num_hidden_layers=decoder.num_layers,
            # As the cache counts them, which is what caches of transformers are made by.
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

    It has no parameters: nothing of it can be trained, moved or cast. Caches are `transformers.DynamicCache`.

    Args:
        runtime: of a bundle that holds a whole model.

    Attributes:
        runtime: what computes.

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
            path: its directory.
            **options: of `diffdeploy.load`, such as ``device`` and ``trust``.

        Raises:
            DiffDeployError: see `diffdeploy.load`; `InputError` for other options, such as those of transformers that
                say how weights are loaded, and where the bundle holds a block.
        """
        accepted = [name for name, each in signature(load).parameters.items() if each.kind is each.KEYWORD_ONLY]
        if unknown := sorted(options.keys() - accepted):
            raise InputError(f"{unknown[0]} is not accepted for a bundle; accepted: {', '.join(accepted)}")
        return cls(load(path, **options))

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """`from_bundle`, by the name that code for transformers calls."""
        return cls.from_bundle(path, **options)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused, since there are no weights here to save.

        Raises:
            InputError: always.
        """
        raise InputError(f"a bundle is saved by copying its directory, {self.runtime.bundle.path}")

    @property
    def device(self) -> torch.device:
        """Where the bundle runs."""
        return torch.device(self.runtime.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and caches."""
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
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, in the terms of transformers.

        Args:
            input_ids: new tokens ``[B, S]``, int64.
            attention_mask: ``[B, T]``, 0 for padding; by default there is none.
            position_ids: ``[B, S]``; by default those behind the cache, whatever the mask.
            past_key_values: cache of the tokens before; it takes the new ones.
            use_cache: make a cache where none is given.
            logits_to_keep: of how many last positions; 0 for all.
            return_dict: give a tuple where this is false.
            **others: what else transformers passes on, of which nothing changes the result.

        Returns:
            ``logits [B, S, V]`` in `dtype`, and the cache.

        Raises:
            InputError: inputs that the bundle does not accept, logits of positions that it does not give, a cache of
                another kind, or an output that it does not have.
        """
        for name in _NOT_GIVEN:
            # By identity: a tensor has no truth.
            if others.get(name) is not None and others[name] is not False:
                raise InputError(f"{name} is not something that a bundle takes or gives; leave it out")
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
        found = CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return found.to_tuple() if return_dict is False else found

    def _require_logits(self, wanted: int, length: int) -> None:
        if self.runtime.spec.logits == "last" and (wanted or length) > 1:
            raise InputError(
                f"logits of {wanted or length} positions are asked for, and the bundle gives those of the last one; "
                "export with --logits all"
            )

    def _cached(self, cache: DynamicCache | None, input_ids: Tensor) -> dict[str, Tensor]:
        """What the graph takes of a cache, by the names of its inputs; empty before the first token."""
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
        """Put what the graph gives into a cache, in place of what it took: past and new tokens together."""
        if cache is None:
            return
        for number, pair in enumerate(self._pairs()):
            keys, values = (outputs[self.runtime.spec.caches[name]] for name in pair)
            layer = _layer(cache, number)
            assert layer is not None
            if layer.is_initialized:
                # Not `update`, which would copy all of it once more to put the new tokens behind the past.
                layer.keys, layer.values = keys, values
            else:
                layer.update(keys, values)

    def _pairs(self) -> list[tuple[str, str]]:
        """Names of keys and values of each layer."""
        names = list(self.runtime.spec.caches)
        return list(zip(names[::2], names[1::2], strict=True))


def _layer(cache: DynamicCache | None, number: int) -> DynamicLayer | None:
    """A layer of a cache; those that it makes when they are first asked for are made now.

    Raises:
        InputError: a cache of another kind, such as a static or quantised one.
    """
    if cache is None:
        return None
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(number + 1 - len(cache.layers))]
    # The class itself: others derive from it that hold less than all tokens.
    if number >= len(cache.layers) or type(cache.layers[number]) is not DynamicLayer or cache.offloading:
        raise InputError(
            f"the cache is a {type(cache).__name__}, or one of parts of the past; accepted is a DynamicCache of it all"
        )
    return cache.layers[number]


def _generation_config(bundle: Bundle, config: DiffDeployConfig) -> GenerationConfig:
    """What the checkpoint says of generating, with the token that ends texts as the runtime has it."""
    found = GenerationConfig()
    if _GENERATION_CONFIG in bundle.manifest.files:
        found = GenerationConfig.from_dict(json.loads((bundle.path / _GENERATION_CONFIG).read_text(encoding="utf-8")))
    found.eos_token_id = config.eos_token_id
    return found


# Pipelines look here for what they accept.
AutoConfig.register(DiffDeployConfig.model_type, DiffDeployConfig, exist_ok=True)
AutoModelForCausalLM.register(DiffDeployConfig, DiffDeployForCausalLM, exist_ok=True)
