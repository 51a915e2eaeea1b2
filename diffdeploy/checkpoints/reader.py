"""From a checkpoint and the user's options to a canonical config and its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from diffdeploy.checkpoints.detect import AUTO, Found, find_blocks, prefix_of_layer
from diffdeploy.checkpoints.files import TensorFile, open_tensors, read_config_fields
from diffdeploy.checkpoints.layouts import Layout, Source
from diffdeploy.checkpoints.rows import Sizes, to_canonical
from diffdeploy.config import (
    AnyConfig,
    DiffAttentionConfig,
    DiffAttentionV2Config,
    GqaLayout,
    RopeConfig,
    RopeStyle,
    lambda_init_at,
)
from diffdeploy.errors import InputError
from diffdeploy.files import file_sha256

__all__ = ["BlockReader", "Checkpoint", "CheckpointOptions", "SourceFile", "list_layers", "read_checkpoint"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a state dict cannot say. ``None`` means: take it from the key or from ``config.json``.

    Attributes:
        layout: name of a layout; by default it is recognised.
        layer: 0-based layer to read out of a larger state dict.
        depth: 0-based layer index that sets ``lambda_init``; by default what the layout makes of the one in the key.
        rope: rotary style, or ``none``.
        rope_theta: rotary base.
        gqa_layout: which key stream a query stream reads when ``h_kv < h``.
    """

    layout: str | None = None
    layer: int | None = None
    depth: int | None = None
    rope: Literal["interleaved", "half", "none"] | None = None
    rope_theta: float | None = None
    gqa_layout: GqaLayout | None = None

    def given(self) -> dict[str, int | float | str]:
        """Those that are not left open."""
        return {name: value for name, value in asdict(self).items() if value not in (None, AUTO)}

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> Self:
        """Inverse of `given`."""
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that weights were read from."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One block as it was found.

    Attributes:
        config: canonical config.
        weights: canonical weights in the checkpoint's dtypes, named as ``config.weight_shapes()`` says.
        layout: name of the layout.
        layer: index in the key, if there is one.
        keys: the keys that were read.
        files: the files that were read.
        options: what was asked for.
    """

    config: AnyConfig
    weights: dict[str, Tensor]
    layout: str
    layer: int | None
    keys: list[str]
    files: tuple[SourceFile, ...] = ()
    options: CheckpointOptions = CheckpointOptions()


class BlockReader:
    """Reads what one block says of itself; `config` and `weights` are taken from it.

    Args:
        file: the checkpoint.
        fields: of its config.json.
        found: its layout and blocks.
        prefix: of the block.
        options: what was asked for.
    """

    def __init__(
        self, file: TensorFile, fields: Mapping[str, Any], found: Found, prefix: str, options: CheckpointOptions
    ) -> None:
        self.file, self.fields, self.found, self.prefix, self.options = file, fields, found, prefix, options
        self.layout: Layout = found.layout
        self.layer = found.blocks[prefix]
        keys = file.keys()
        self.names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        self.sources: dict[str, Source] = {
            **self.layout.sources,
            **{name: source for name, source in self.layout.optional.items() if source.key in self.names},
        }
        reason = self.layout.refuse(self.names, fields, self.layer)
        if reason is not None:
            raise InputError(f"{prefix.rstrip('.') or file.path.name} cannot be deployed: {reason}")
        self.sizes = self._sizes()

    @property
    def keys(self) -> list[str]:
        """The keys that hold the block."""
        return list(dict.fromkeys(self.prefix + source.key for source in self.sources.values()))

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        key = self.prefix + self.sources[name].key
        shape = self.file.shape(key)
        if len(shape) != rank or 0 in shape:
            raise InputError(f"{key} has shape {list(shape)}; accepted is a rank of {rank}")
        return shape

    def _sizes(self) -> Sizes:
        """Sizes from shapes, held against the fields that name them."""
        q_rows, embed_dim = self._shape("q_proj.weight", 2)
        k_rows, _ = self._shape("k_proj.weight", 2)
        packed = self.layout.sources["q_proj.weight"].part is not None
        if packed:
            columns = self._shape("out_proj.weight", 2)[1]
            q_rows, k_rows = columns, (k_rows - columns) // 2
        if self.layout.version == 2:
            num_heads = self._shape("lambda_proj.weight", 2)[0]
            head_dim, kv_width = q_rows // (2 * num_heads), q_rows // (2 * num_heads)
        else:
            vector = "subln.weight" if self.sources["lambda_q1"].scalar else "lambda_q1"
            head_dim = self._shape(vector, 1)[0] // (2 if vector == "subln.weight" else 1)
            kv_width = 2 * head_dim
        counts = {}
        for field, name, rows, width in (
            ("num_heads", "q_proj.weight", q_rows, 2 * head_dim),
            ("num_kv_heads", "k_proj.weight", k_rows, kv_width),
        ):
            if head_dim == 0 or rows % width:
                raise InputError(
                    f"{self.prefix}{self.sources[name].key} has {rows} rows; accepted is a multiple of {width}, "
                    "as the shapes of lambda say"
                )
            counts[field] = rows // width
        for field, (name, factor) in self.layout.head_fields.items():
            stated = self._field(field, int)
            if stated is not None and stated != factor * counts[name]:
                raise InputError(
                    f"{field} in config.json is {stated}, but the weights have {factor * counts[name]}; one is wrong"
                )
        return Sizes(embed_dim, counts["num_heads"], counts["num_kv_heads"], head_dim)

    def _field(self, name: str, kind: type) -> Any:
        """A field of config.json with its type checked; ``None`` when it is not there."""
        value = self.fields.get(name)
        accepted = (int, float) if kind is float else (kind,)
        if value is not None and (not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)):
            raise InputError(f"{name} in config.json is {value!r}; accepted is a {kind.__name__}")
        return value

    def depth(self) -> int | None:
        """Layer index that sets ``lambda_init``, if it is known."""
        for depth in (self.options.depth, self._field("depth", int)):
            if depth is not None:
                if depth < 0:
                    raise InputError(f"depth is {depth}; accepted is a 0-based layer index")
                return int(depth)
        return None if self.layer is None else self.layer + self.layout.depth_offset

    def rope_style(self) -> str | None:
        """``interleaved``, ``half`` or ``none``, if it is known."""
        if self.options.rope is not None:
            return self.options.rope
        if self.layout.rope is not None:
            found = self.layout.rope(self.fields)
            return "none" if found is None else found.style
        stored = self.fields.get("rope")
        return stored.get("style") if isinstance(stored, dict) else stored

    def rope(self) -> RopeConfig | None:
        """Rotary embedding from the options, else from the layout or config.json.

        Raises:
            InputError: nothing says it.
        """
        if self.layout.rope is not None and self.options.rope is None and self.options.rope_theta is None:
            return self.layout.rope(self.fields)
        style = self.rope_style()
        if style is None:
            raise InputError(
                "--rope interleaved|half|none is missing: the weights are the same for every rotary style, so it "
                "cannot be guessed, and there is no config.json beside them that says it"
            )
        if style == "none":
            return None
        theta = self.rope_theta()
        if theta is None:
            raise InputError(
                "--rope-theta is missing: the base of the rotary frequencies is not in the weights, so it cannot be "
                "guessed (the paper's models use 10000)"
            )
        return RopeConfig(style=cast(RopeStyle, style), theta=theta)

    def rope_theta(self) -> float | None:
        """Rotary base, if it is known."""
        if self.options.rope_theta is not None:
            return self.options.rope_theta
        stored = self.layout.rope(self.fields) if self.layout.rope is not None else None
        theta = stored.theta if stored is not None else (self.fields.get("rope") or {})
        theta = theta.get("theta") if isinstance(theta, dict) else theta
        return None if theta is None else float(theta)

    def gqa_layout(self) -> GqaLayout | None:
        """Key map, if it is known or makes no difference."""
        chosen = self.options.gqa_layout or self._field("gqa_layout", str)
        if chosen is None and self.sizes.num_heads == self.sizes.num_kv_heads:
            return "canonical"
        return chosen or (None if self.found.also else self.layout.gqa_layout)

    def norm_eps(self) -> float:
        """Epsilon of the norm."""
        eps = self._field(self.layout.norm_eps_field, float)
        return 1e-5 if eps is None else float(eps)

    def config(self) -> AnyConfig:
        """The canonical config.

        Raises:
            InputError: something that cannot be inferred was not given.
        """
        window = self.layout.sliding_window(self.fields, self.layer)
        if self.layout.version == 2:
            return DiffAttentionV2Config(**self.sizes._asdict(), rope=self.rope(), sliding_window=window)
        depth = self.depth()
        if depth is None:
            raise InputError(
                "--depth is missing: lambda_init depends on the layer index, the keys have none, and the weights do "
                "not record it"
            )
        gqa_layout = self.gqa_layout()
        if gqa_layout is None:
            raise InputError(
                "--gqa-layout is missing: with fewer key/value heads than heads, Microsoft's naive and flash modules "
                "read different key streams from the same weights, so it cannot be guessed; give canonical (flash) or "
                "legacy (naive, and every variant of multihead-sdpadiff, which --layout sdpadiff says too)"
            )
        lambda_init = lambda_init_at(depth)
        return DiffAttentionConfig(
            **self.sizes._asdict(),
            lambda_init=lambda_init,
            output_scale=1 - lambda_init,
            causal=self.layout.causal,
            rope=self.rope(),
            gqa_layout=gqa_layout,
            norm_eps=self.norm_eps(),
            norm_affine="subln.weight" in self.sources,
            qk_norm_eps=self.layout.qk_norm_eps if "q_norm.weight" in self.sources else None,
            qkv_bias="q_proj.bias" in self.sources,
            out_bias="out_proj.bias" in self.sources,
            sliding_window=window,
        )

    def _get(self, name: str) -> Tensor:
        key = self.prefix + name
        tensor = self.file.get(key)
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{key} has dtype {tensor.dtype}; accepted are fp64, fp32, fp16 and bf16")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{key} holds NaN or infinity; such a block cannot be deployed")
        return tensor

    def weights(self, config: AnyConfig) -> dict[str, Tensor]:
        """Canonical weights, read now.

        Raises:
            InputError: a shape that does not fit the others, or a tensor that cannot be deployed.
        """
        shapes = config.weight_shapes()
        expected: dict[str, list[int]] = {}
        for name, source in self.sources.items():
            shape = [] if source.scalar else list(shapes[name])
            if source.part is not None and source.key in expected:
                expected[source.key][0] += shape[0]
            else:
                expected[source.key] = shape
        for name, wanted in expected.items():
            given = list(self.file.shape(self.prefix + name))
            if given != wanted:
                raise InputError(
                    f"{self.prefix}{name} has shape {given}; accepted is {wanted}, as the other shapes say"
                )
        canonical = to_canonical(self.sources, self._get, self.sizes)
        return {name: canonical[name] for name in shapes}


def list_layers(path: str | Path, layout: str | None = None) -> list[int]:
    """The layers of a checkpoint that have differential attention.

    Raises:
        InputError: the file cannot be read, its layout is not known, or its keys have no layer index.
    """
    file = open_tensors(Path(path))
    found = find_blocks(file.keys(), read_config_fields(file.path), layout, file.path)
    layers = [layer for layer in found.blocks.values() if layer is not None]
    if not layers:
        raise InputError(f"{file.path} holds one block without a layer index; leave --layer out")
    return layers


def read_checkpoint(path: str | Path, options: CheckpointOptions | None = None) -> Checkpoint:
    """Read one differential-attention block; of a large checkpoint only its tensors are read.

    Args:
        path: ``.safetensors`` or ``torch.save`` file, index of shards, or a directory with one; the block may stand in
            a larger state dict.
        options: what the file cannot say; a ``config.json`` beside the weights may say it too.

    Raises:
        InputError: the file cannot be read, the block is not whole, a shape or value is wrong, or something that cannot
            be inferred was not given.
    """
    options = options or CheckpointOptions()
    file = open_tensors(Path(path))
    fields = read_config_fields(file.path)
    found = find_blocks(file.keys(), fields, options.layout, file.path)
    reader = BlockReader(file, fields, found, prefix_of_layer(found, options.layer, file.path), options)
    config = reader.config()
    weights = reader.weights(config)
    holders = dict.fromkeys(file.holder(key) for key in reader.keys)
    return Checkpoint(
        config=config,
        weights=weights,
        layout=found.layout.name,
        layer=reader.layer,
        files=tuple(SourceFile(name=p.name, size=p.stat().st_size, sha256=file_sha256(p)) for p in holders),
        keys=reader.keys,
        options=options,
    )
