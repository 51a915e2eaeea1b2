"""From a checkpoint file and the user's options to a canonical config and its weights."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffdeploy.checkpoints import microsoft
from diffdeploy.checkpoints.files import TensorFile, open_tensors, read_config_fields
from diffdeploy.config import AnyConfig, DiffAttentionConfig, GqaLayout, RopeConfig, RopeStyle, lambda_init_at
from diffdeploy.digests import file_sha256
from diffdeploy.errors import InputError

__all__ = ["BlockSummary", "Checkpoint", "CheckpointOptions", "read_checkpoint", "summarise"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a state dict cannot say. ``None`` means: take it from the key or from ``config.json``.

    Attributes:
        layer: 0-based layer to read out of a larger state dict.
        depth: 0-based layer index that sets ``lambda_init``; by default the one in the key.
        rope: rotary style, or ``none``.
        rope_theta: rotary base.
        gqa_layout: which key stream a query stream reads when ``h_kv < h``.
    """

    layer: int | None = None
    depth: int | None = None
    rope: Literal["interleaved", "half", "none"] | None = None
    rope_theta: float | None = None
    gqa_layout: GqaLayout | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One block as it was found.

    Attributes:
        config: canonical config.
        weights: canonical weights in the checkpoint's dtypes, named as `DiffAttentionConfig.weight_shapes` says.
        layout: name of the layout that was recognised.
        layer: index in the key, if there is one.
        file_name: name of the weights file.
        file_sha256: digest of the weights file.
        keys: the keys that were read.
    """

    config: AnyConfig
    weights: dict[str, Tensor]
    layout: str
    layer: int | None
    file_name: str
    file_sha256: str
    keys: list[str]


def _find_blocks(keys: list[str], path: Path) -> dict[str, int | None]:
    """Prefixes that hold all required keys, with the layer index in each."""
    suffix = microsoft.REQUIRED[0]
    prefixes = [key.removesuffix(suffix) for key in keys if key == suffix or key.endswith("." + suffix)]
    present = set(keys)
    blocks: dict[str, int | None] = {}
    missing: dict[str, list[str]] = {}
    for prefix in prefixes:
        absent = [prefix + name for name in microsoft.REQUIRED if prefix + name not in present]
        if absent:
            missing[prefix] = absent
            continue
        indices = _LAYER_INDEX.findall("." + prefix)
        blocks[prefix] = int(indices[-1]) if indices else None
    if not blocks:
        if missing:
            raise InputError(f"{path} lacks the keys {', '.join(next(iter(missing.values())))}, so no block is whole")
        raise InputError(
            f"{path} has a layout that is not known; accepted is microsoft (keys {', '.join(microsoft.REQUIRED)}), "
            f"and this one begins with {', '.join(sorted(keys)[:3])}"
        )
    return blocks


def _choose_block(blocks: dict[str, int | None], layer: int | None, path: Path) -> str:
    if len(blocks) == 1 and layer is None:
        return next(iter(blocks))
    layers = sorted(index for index in blocks.values() if index is not None)
    listed = ", ".join(map(str, layers)) or "none (the keys have no layer index)"
    if layer is None:
        raise InputError(f"{path} holds several layers; choose one with --layer: {listed}")
    chosen = [prefix for prefix, index in blocks.items() if index == layer]
    if len(chosen) != 1:
        raise InputError(f"layer {layer} is not in {path} exactly once; its layers are: {listed}")
    return chosen[0]


def _read_weights(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    keys = set(file.keys())
    names = [name for name in (*microsoft.REQUIRED, *microsoft.OPTIONAL) if prefix + name in keys]
    weights = {name: file.get(prefix + name).contiguous() for name in names}
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{prefix}{name} has dtype {tensor.dtype}; accepted are fp64, fp32, fp16 and bf16")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{prefix}{name} holds NaN or infinity; such a block cannot be deployed")
    return weights


def _sizes(weights: dict[str, Tensor], prefix: str) -> dict[str, int]:
    """``embed_dim, num_heads, num_kv_heads, head_dim`` from shapes."""
    for name in microsoft.REQUIRED:
        rank = 1 if name.startswith("lambda") else 2
        if weights[name].ndim != rank or 0 in weights[name].shape:
            raise InputError(f"{prefix}{name} has shape {list(weights[name].shape)}; accepted is a rank of {rank}")
    head_dim = weights["lambda_q1"].shape[0]
    sizes = {"embed_dim": weights["q_proj.weight"].shape[1], "head_dim": head_dim}
    for field, name in (("num_heads", "q_proj.weight"), ("num_kv_heads", "k_proj.weight")):
        rows = weights[name].shape[0]
        if rows % (2 * head_dim):
            raise InputError(
                f"{prefix}{name} has {rows} rows; accepted is a multiple of {2 * head_dim}, "
                "twice the length of lambda_q1"
            )
        sizes[field] = rows // (2 * head_dim)
    return sizes


def _field(fields: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    """A field of config.json with its type checked; ``None`` when it is not there."""
    value = fields.get(name)
    accepted = (int, float) if kind is float else (kind,)
    if value is not None and (not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)):
        raise InputError(f"{name} in {path.parent / 'config.json'} is {value!r}; accepted is a {kind.__name__}")
    return value


def _rope(options: CheckpointOptions, fields: dict[str, Any], path: Path) -> RopeConfig | None:
    """Rotary embedding from the options, else from config.json: ``"rope": {"style", "theta"}`` or ``"none"``."""
    stored = fields.get("rope")
    known = stored if isinstance(stored, dict) else {}
    style = options.rope or known.get("style") or (stored if isinstance(stored, str) else None)
    if style is None:
        raise InputError(
            "--rope interleaved|half|none is missing: the weights are the same for every rotary style, so it cannot be "
            "guessed, and there is no config.json beside them that says it"
        )
    if style == "none":
        return None
    theta = options.rope_theta if options.rope_theta is not None else _field(known, "theta", float, path)
    if theta is None:
        raise InputError(
            "--rope-theta is missing: the base of the rotary frequencies is not in the weights, so it cannot be "
            "guessed (the paper's models use 10000)"
        )
    return RopeConfig(style=cast(RopeStyle, style), theta=float(theta))


def _depth(options: CheckpointOptions, layer: int | None, fields: dict[str, Any], path: Path) -> int:
    for depth in (options.depth, _field(fields, "depth", int, path), layer):
        if depth is not None:
            if depth < 0:
                raise InputError(f"depth is {depth}; accepted is a 0-based layer index")
            return int(depth)
    raise InputError(
        "--depth is missing: lambda_init depends on the layer index, the keys have none, and the weights do "
        "not record it"
    )


def _gqa_layout(options: CheckpointOptions, fields: dict[str, Any], sizes: dict[str, int], path: Path) -> GqaLayout:
    layout = options.gqa_layout or _field(fields, "gqa_layout", str, path)
    if layout is None and sizes["num_heads"] != sizes["num_kv_heads"]:
        raise InputError(
            "--gqa-layout is missing: with fewer key/value heads than heads, Microsoft's naive and flash modules read "
            "different key streams from the same weights, so it cannot be guessed"
        )
    chosen: GqaLayout = layout or "canonical"
    return chosen


def read_checkpoint(path: str | Path, options: CheckpointOptions | None = None) -> Checkpoint:
    """Read one differential-attention block in Microsoft's V1 layout.

    Args:
        path: ``.safetensors`` or ``torch.save`` file, or a directory with one; the block may stand in a larger state
            dict.
        options: what the file cannot say; a ``config.json`` beside the weights may say it too.

    Raises:
        InputError: the file cannot be read, the block is not whole, a shape or value is wrong, or something that cannot
            be inferred was not given.
    """
    options = options or CheckpointOptions()
    file = open_tensors(Path(path))
    blocks = _find_blocks(file.keys(), file.path)
    prefix = _choose_block(blocks, options.layer, file.path)
    weights = _read_weights(file, prefix)
    fields = read_config_fields(file.path)
    sizes = _sizes(weights, prefix)
    lambda_init = lambda_init_at(_depth(options, blocks[prefix], fields, file.path))
    eps = _field(fields, "norm_eps", float, file.path)
    config = DiffAttentionConfig(
        embed_dim=sizes["embed_dim"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        lambda_init=lambda_init,
        output_scale=1 - lambda_init,
        rope=_rope(options, fields, file.path),
        gqa_layout=_gqa_layout(options, fields, sizes, file.path),
        norm_eps=microsoft.NORM_EPS if eps is None else float(eps),
        norm_affine="subln.weight" in weights,
    )
    for name, shape in config.weight_shapes().items():
        if tuple(weights[name].shape) != shape:
            raise InputError(
                f"{prefix}{name} has shape {list(weights[name].shape)}; accepted is {list(shape)}, "
                "as the other shapes say"
            )
    return Checkpoint(
        config=config,
        weights=weights,
        layout="microsoft",
        layer=blocks[prefix],
        file_name=file.path.name,
        file_sha256=file_sha256(file.path),
        keys=[prefix + name for name in weights],
    )


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """What can be said of a block without any option; ``None`` where neither the keys nor ``config.json`` say it."""

    prefix: str
    layer: int | None
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_affine: bool
    rope: str | None
    rope_theta: float | None
    gqa_layout: str | None
    lambda_init: float | None
    lambda_value: float | None
    dtype: str
    num_parameters: int


def summarise(path: str | Path) -> list[BlockSummary]:
    """Every block of a checkpoint, in the order of its layers.

    Raises:
        InputError: the file cannot be read or holds no differential-attention block.
    """
    file = open_tensors(Path(path))
    fields = read_config_fields(file.path)
    blocks = sorted(_find_blocks(file.keys(), file.path).items(), key=lambda item: (item[1] or 0, item[0]))
    return [_summarise_block(file, prefix, layer, fields) for prefix, layer in blocks]


def _summarise_block(file: TensorFile, prefix: str, layer: int | None, fields: dict[str, Any]) -> BlockSummary:
    weights = _read_weights(file, prefix)
    stored = fields.get("rope")
    rope = stored if isinstance(stored, dict) else {"style": stored}
    depth = _field(fields, "depth", int, file.path)
    depth = layer if depth is None else depth
    lambda_init = None if depth is None else lambda_init_at(depth)
    q1, k1, q2, k2 = (weights[f"lambda_{name}"].double() for name in ("q1", "k1", "q2", "k2"))
    learned = float(torch.exp(q1 @ k1) - torch.exp(q2 @ k2))
    return BlockSummary(
        prefix=prefix,
        layer=layer,
        **_sizes(weights, prefix),
        norm_affine="subln.weight" in weights,
        rope=rope.get("style"),
        rope_theta=rope.get("theta"),
        gqa_layout=_field(fields, "gqa_layout", str, file.path),
        lambda_init=lambda_init,
        lambda_value=None if lambda_init is None else learned + lambda_init,
        dtype=str(weights["q_proj.weight"].dtype).removeprefix("torch."),
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
    )
