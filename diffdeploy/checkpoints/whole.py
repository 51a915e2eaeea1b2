"""Read a whole decoder from a checkpoint: its config immediately, its weights one layer at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diffdeploy.checkpoints.detect import Found, find_blocks
from diffdeploy.checkpoints.fields import Fields, listed, read_config_fields, shortened, typed_field
from diffdeploy.checkpoints.files import TensorFile, open_tensors
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.reader import BlockReader, SourceFile
from diffdeploy.checkpoints.skeletons import Skeleton, find_skeleton
from diffdeploy.config import AnyConfig, DecoderConfig, LayerConfig, MlpConfig
from diffdeploy.errors import InputError
from diffdeploy.files import file_sha256

__all__ = ["ModelCheckpoint", "holds_model", "read_model"]

# Files that other runtimes and tokenizers read next to the weights.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_SILU = ("silu", "swish")
# Fields of model configs that change what a decoder computes, with the values that have no effect.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "final_logit_softcapping": (),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "use_mhc": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint:
    """A whole decoder, read from a checkpoint.

    Attributes:
        config: config of the decoder.
        weights: canonical weights in the checkpoint's dtypes, named as in ``config.weight_shapes()`` and read on
            request, one layer at a time.
        layout: name of the layout of the blocks.
        layer: always ``None``, since all layers are read.
        keys: the keys that are read.
        files: the files that contain them.
        options: the options that were given.
        defaults: fields that config.json leaves to the source's own config class, with the value and the class.
        max_positions: ``max_position_embeddings`` of config.json, if present.
        companions: files next to the weights that tokenizers and other runtimes read.
    """

    config: DecoderConfig
    weights: Mapping[str, Tensor]
    layout: str
    keys: list[str]
    layer: None = None
    files: tuple[SourceFile, ...] = ()
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    defaults: dict[str, str] = field(default_factory=dict)
    max_positions: int | None = None
    companions: tuple[Path, ...] = ()


class _Weights(Mapping[str, Tensor]):
    """Canonical weights of a model; only one block is in memory at a time, since its tensors are created together."""

    def __init__(
        self, file: TensorFile, config: DecoderConfig, plain: dict[str, str], blocks: list[BlockReader]
    ) -> None:
        self._file, self._plain, self._blocks = file, plain, blocks
        self._names = list(config.weight_shapes())
        self._layers = config.layers
        self._held: tuple[int, dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._plain:
            return self._file.get(self._plain[name])
        _, number, _, of_block = name.split(".", 3)
        layer = int(number)
        if self._held is None or self._held[0] != layer:
            self._held = layer, self._blocks[layer].weights(self._layers[layer].attention)
        return self._held[1][of_block]


def holds_model(path: str | Path, names: str | None = None) -> bool:
    """True if a checkpoint has a token embedding and is therefore a whole model or part of one.

    Args:
        path: the checkpoint.
        names: see `CheckpointOptions`.

    Raises:
        InputError: the files cannot be read, or ``names`` does not fit them.
    """
    return find_skeleton(set(open_tensors(Path(path)).keys()), names) is not None


def read_model(path: str | Path, options: CheckpointOptions | None = None) -> ModelCheckpoint:
    """Read a whole decoder: embedding, layers of differential attention and gated MLPs, final norm and head.

    Args:
        path: ``.safetensors`` or ``torch.save`` file, index of shards, or a directory with one.
        options: settings of the blocks that the files do not contain.

    Raises:
        InputError: the files cannot be read, the model is incomplete, a tensor does not belong to a decoder, or a
            setting that cannot be inferred was not given.
    """
    options = options or CheckpointOptions()
    file = open_tensors(Path(path))
    fields, keys = read_config_fields(file.path), set(file.keys())
    skeleton = find_skeleton(keys, options.names)
    if skeleton is None:
        raise InputError(f"{file.path} has no token embedding, so it is not a whole model; --layer exports its blocks")
    found = find_blocks(file.keys(), fields, options.layout, file.path)
    if found.layout.why_no_model is not None:
        raise InputError(
            f"{file.path} cannot be exported as a whole model: {found.layout.why_no_model}; --layer N exports a block"
        )
    return _Reader(file, fields, keys, skeleton, found, options).checkpoint()


class _Reader:
    def __init__(
        self,
        file: TensorFile,
        fields: Fields,
        keys: set[str],
        skeleton: Skeleton,
        found: Found,
        options: CheckpointOptions,
    ) -> None:
        self.file, self.fields, self.keys, self.skeleton = file, fields, keys, skeleton
        self.found, self.options = found, options
        self.layout = found.layout
        self.defaults: dict[str, str] = {}

    def checkpoint(self) -> ModelCheckpoint:
        """Read the config and run all checks that need no weights, which are read on request."""
        self._require_known_fields()
        blocks = [self._block(number) for number in range(self._num_layers())]
        attention = [block.config() for block in blocks]
        plain = self._plain_keys(len(blocks))
        config = self._config(attention, plain)
        self._require_shapes(config, plain)
        read = [*plain.values(), *(key for block in blocks for key in block.tensors.keys)]
        self._require_all_read({*read, *(key for key in self.keys if config.tied and key == self.skeleton.head)})
        self.defaults |= blocks[0].settings.defaults()
        if self.layout.eos_token_id is not None and "eos_token_id" not in self.fields:
            self.defaults["eos_token_id"] = f"{self.layout.eos_token_id} of {self.layout.config_class}"
        holders = dict.fromkeys(self.file.holder(key) for key in read)
        directory = self.file.path.parent
        return ModelCheckpoint(
            config=config,
            weights=_Weights(self.file, config, plain, blocks),
            layout=self.layout.name,
            keys=read,
            files=tuple(SourceFile(name=p.name, size=p.stat().st_size, sha256=file_sha256(p)) for p in holders),
            options=self.options,
            defaults=self.defaults,
            max_positions=blocks[0].settings.max_positions(),
            companions=tuple(path for name in _COMPANIONS if (path := directory / name).is_file()),
        )

    def _num_layers(self) -> int:
        numbers = list(self.skeleton.layers(self.keys))
        names = ("num_hidden_layers", "num_layers")
        said = next((typed_field(self.fields, name, int) for name in names if name in self.fields), None)
        wanted = len(numbers) if said is None else said
        if numbers != list(range(wanted)) or not numbers:
            shown = listed(map(str, numbers)) or "none"
            raise InputError(
                f"{self.file.path} has the layers {shown}; accepted: all from 0 to {max(wanted, 1) - 1}"
                + ("" if said is None else f", as config.json says ({said})")
            )
        return wanted

    def _block(self, number: int) -> BlockReader:
        prefix = self.skeleton.layer.format(number) + self.skeleton.block
        if prefix not in self.found.blocks:
            raise InputError(
                f"layer {number} of {self.file.path} has no block of layout {self.layout.name} at {prefix}, unlike "
                "other layers; a decoder needs layers of one kind, and --layer exports a single layer that has a block"
            )
        return BlockReader(self.file, self.fields, self.found, prefix, self.options)

    def _plain_keys(self, num_layers: int) -> dict[str, str]:
        """Keys of all tensors outside the blocks, by their canonical names."""
        plain = {"embedding.weight": self.skeleton.embedding, "norm.weight": self.skeleton.norm}
        if not self._tied():
            plain["lm_head.weight"] = self.skeleton.head
        for number in range(num_layers):
            for name, key in self.skeleton.parts.items():
                full = self.skeleton.layer.format(number) + key
                # The first layer shows whether the model has these at all.
                optional = name.endswith(".bias") or ".act." in name
                if not optional or self.skeleton.layer.format(0) + key in self.keys:
                    plain[f"layers.{number}.{name}"] = full
        absent = [key for key in plain.values() if key not in self.keys]
        if absent:
            raise InputError(
                f"{self.file.path} has an embedding, but lacks {listed(absent)}, so it is not a whole model; copy the "
                "missing tensors, or export a block with --layer"
            )
        return plain

    def _tied(self) -> bool:
        """True if the head shares the embedding's weights."""
        given = self.fields.get("tie_word_embeddings")
        if given is not None and not isinstance(given, bool):
            raise InputError(f"tie_word_embeddings in config.json is {shortened(given)}; accepted: true or false")
        if given is None and self.skeleton.head not in self.keys:
            raise InputError(
                f"{self.file.path} lacks {self.skeleton.head}, and no config.json says that the head shares the "
                "embedding's weights (tie_word_embeddings true)"
            )
        return bool(given)

    def _config(self, attention: list[AnyConfig], plain: dict[str, str]) -> DecoderConfig:
        vocab_size, width = self._shape_of("embedding.weight", plain, 2)
        said = typed_field(self.fields, "vocab_size", int)
        if said is not None and said != vocab_size:
            raise InputError(
                f"vocab_size in config.json is {said}, but the embedding in {self.file.path} has {vocab_size} rows"
            )
        layers = tuple(
            LayerConfig(attention=block, mlp=self._mlp(number, plain)) for number, block in enumerate(attention)
        )
        return DecoderConfig(
            vocab_size=vocab_size, embed_dim=width, layers=layers, norm_eps=self._norm_eps(), tied=self._tied()
        )

    def _shape_of(self, name: str, plain: dict[str, str], num_axes: int) -> tuple[int, ...]:
        shape = self.file.shape(plain[name])
        if len(shape) != num_axes:
            raise InputError(f"{plain[name]} in {self.file.path} has shape {list(shape)}; accepted: {num_axes} axes")
        return shape

    def _mlp(self, number: int, plain: dict[str, str]) -> MlpConfig:
        def has(name: str) -> bool:
            return f"layers.{number}.ffn.{name}" in plain

        act = self.fields.get("hidden_act")
        if has("act.weight"):
            if act not in (None, "poly_norm"):
                raise InputError(f"hidden_act in config.json is {shortened(act)}, but the MLPs have PolyNorm's weights")
        elif act not in (None, *_SILU):
            raise InputError(f"hidden_act in config.json is {shortened(act)}; accepted: {', '.join(_SILU)}, or "
                             "poly_norm with its weights")  # fmt: skip
        hidden_dim, _ = self._shape_of(f"layers.{number}.ffn.gate_proj.weight", plain, 2)
        said = typed_field(self.fields, "intermediate_size", int)
        if said is not None and said != hidden_dim:
            raise InputError(
                f"intermediate_size in config.json is {said}, but the MLP of layer {number} has {hidden_dim}"
            )
        return MlpConfig(
            hidden_dim=hidden_dim,
            kind="polynorm" if has("act.weight") else "swiglu",
            bias=has("gate_proj.bias"),
        )

    def _norm_eps(self) -> float:
        """Epsilon of the norms around the blocks, which is never guessed, since nothing in the weights shows it."""
        for name in ("rms_norm_eps", "norm_eps"):
            if (eps := typed_field(self.fields, name, float)) is not None:
                return float(eps)
        default = self.layout.class_defaults.get("rms_norm_eps")
        if default is None:
            raise InputError(
                f"no config.json next to {self.file.path} states rms_norm_eps, the epsilon of the norms around the "
                "blocks, and the weights do not show it; add it"
            )
        self.defaults["rms_norm_eps"] = f"{default:g} of {self.layout.config_class}"
        return default

    def _require_shapes(self, config: DecoderConfig, plain: dict[str, str]) -> None:
        shapes = config.weight_shapes()
        for name, key in plain.items():
            if (shape := self.file.shape(key)) != shapes.get(name):
                wanted = f"requires {list(shapes[name])}" if name in shapes else "does not use this tensor"
                raise InputError(f"{key} in {self.file.path} has shape {list(shape)}; the rest of the model {wanted}")

    def _require_all_read(self, read: set[str]) -> None:
        dropped = sorted(key for key in self.keys - read if not self._irrelevant(key))
        if dropped:
            raise InputError(
                f"{self.file.path} contains {listed(dropped)}, which does not belong to a decoder with "
                f"{self.skeleton.name}; no tensor may be dropped, so the model is not exported"
            )

    def _irrelevant(self, key: str) -> bool:
        if self.skeleton.is_irrelevant(key):
            return True
        return any(key.startswith(prefix) and key.removeprefix(prefix) in self.layout.irrelevant
                   for prefix in self.found.blocks)  # fmt: skip

    def _require_known_fields(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = self.fields.get(name)
            if value is not None and value not in neutral:
                raise InputError(
                    f"{name} in config.json is {shortened(value)}, which changes what a decoder computes in a way that "
                    "is not supported; --layer exports its blocks"
                )
