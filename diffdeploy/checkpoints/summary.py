"""Summary of a checkpoint's blocks, as far as it is possible without options."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdeploy.checkpoints.detect import find_blocks
from diffdeploy.checkpoints.fields import read_config_fields
from diffdeploy.checkpoints.files import open_tensors
from diffdeploy.checkpoints.layouts import Layout
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.reader import BlockReader
from diffdeploy.checkpoints.tensors import BlockTensors
from diffdeploy.config import LambdaKind
from diffdeploy.errors import InputError

__all__ = ["BlockSummary", "CheckpointSummary", "summarise"]


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """Summary of one block; ``None`` marks facts that neither the keys nor ``config.json`` state.

    Attributes:
        head_fields: fields of ``config.json`` that count streams, with their meaning in words.
        window_is_known: true if `sliding_window` is known, where ``None`` means no window.
        unread: keys of the block that its layout does not know; such a block is not exported.
        refused: reason why the block cannot be deployed; in that case, only ``prefix`` and ``layer`` are known.
    """

    prefix: str
    layer: int | None
    embed_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    head_fields: tuple[str, ...] = ()
    norm: str | None = None
    rope: str | None = None
    rope_theta: float | None = None
    gqa_layout: str | None = None
    sliding_window: int | None = None
    window_is_known: bool = True
    lambda_init: float | None = None
    lambda_value: float | None = None
    dtype: str | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    unread: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSummary:
    """Summary of a checkpoint: its layout, the reason for it, other layouts with the same keys, and the blocks."""

    layout: str
    why: str
    also: tuple[str, ...]
    version: int
    lambda_kind: LambdaKind
    blocks: tuple[BlockSummary, ...]


def summarise(path: str | Path, layout: str | None = None) -> CheckpointSummary:
    """Summarise every block of a checkpoint, in the order of its layers.

    Raises:
        InputError: the file cannot be read, or contains no known differential attention.
    """
    file = open_tensors(Path(path))
    fields = read_config_fields(file.path)
    found = find_blocks(file.keys(), fields, layout, file.path)
    blocks = []
    for prefix, layer in found.blocks.items():
        try:
            blocks.append(_block(BlockReader(file, fields, found, prefix, CheckpointOptions(layout=layout))))
        except InputError as error:
            # One bad block must not hide the others: a Phi-4 file contains layers that cannot be deployed alone.
            blocks.append(BlockSummary(prefix=prefix, layer=layer, refused=str(error)))
    if all(block.refused is not None for block in blocks):
        raise InputError(str(blocks[0].refused))
    return CheckpointSummary(
        layout=found.layout.name,
        why=found.why,
        also=tuple(other.name for other in found.also),
        version=found.layout.version,
        lambda_kind=found.layout.lambda_kind,
        blocks=tuple(blocks),
    )


def _block(reader: BlockReader) -> BlockSummary:
    # The checks of `BlockTensors.get` are skipped: a block in fp8 or with NaN can be described, but not deployed.
    tensors = [reader.tensors.file.get(key) for key in reader.tensors.keys]
    layout, settings = reader.layout, reader.settings
    missing: list[str] = []
    window = settings.sliding_window(missing)
    lambda_init = None if layout.lambda_kind == "token" else settings.lambda_init()
    affine = "with gamma" if "subln.weight" in reader.tensors.sources else "without gamma"
    return BlockSummary(
        prefix=reader.tensors.prefix,
        layer=reader.layer,
        **reader.sizes.of_config(),
        value_dim=reader.sizes.value_dim,
        head_fields=tuple(_counted_streams(reader)),
        norm=f"eps {settings.norm_eps():g}, {affine}" if settings.has_norm() else "none",
        rope=settings.rope_style(),
        rope_theta=settings.rope_theta(),
        gqa_layout=settings.gqa_layout(reader.sizes),
        sliding_window=window,
        window_is_known=not missing,
        lambda_init=lambda_init,
        lambda_value=None if lambda_init is None else _lambda_value(lambda_init, layout, reader.tensors),
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        num_parameters=sum(tensor.numel() for tensor in tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        unread=tuple(reader.tensors.unread),
    )


def _counted_streams(reader: BlockReader) -> Iterator[str]:
    """Describe each field that counts the streams of a head as separate heads."""
    fields, sizes = reader.settings.fields, reader.sizes.of_config()
    for name, (size, streams) in reader.layout.head_fields.items():
        factor = reader.sizes.value_dim // reader.sizes.head_dim if streams is None else streams
        if factor > 1 and name in fields and reader.sizes.noise_repeat == 1:
            kind = "key/value" if size == "num_kv_heads" else "differential"
            yield f"{name} {fields[name]} is {sizes[size]} {kind} heads of {factor} streams"


def _lambda_value(lambda_init: float, layout: Layout, tensors: BlockTensors) -> float | None:
    """The lambda that all heads share; ``None`` if heads differ or the weights do not yield a number."""
    if layout.lambda_kind == "fixed":
        return lambda_init
    return _finite(lambda_init + _learned_lambda(tensors)) if layout.lambda_kind == "layer" else None


def _learned_lambda(tensors: BlockTensors) -> float:
    """``exp(lq1 . lk1) - exp(lq2 . lk2)``, or ``exp(a) - exp(b)`` if the checkpoint stores two numbers instead."""

    def exponent(pair: int) -> float:
        # This is computed in fp64, as in the oracle from which the verification reports lambda.
        q = tensors.file.get(tensors.key(f"lambda_q{pair}")).double()
        if tensors.sources[f"lambda_q{pair}"].scalar:
            return float(q) if q.numel() == 1 else math.nan
        k = tensors.file.get(tensors.key(f"lambda_k{pair}")).double()
        # Other shapes raise an error when the block is read.
        return float(q @ k) if q.ndim == k.ndim == 1 and q.shape == k.shape else math.nan

    return float(torch.tensor(exponent(1)).double().exp() - torch.tensor(exponent(2)).double().exp())


def _finite(value: float) -> float | None:
    """A finite number, as JSON requires, or ``None``; other numbers raise an error when the block is read."""
    return value if math.isfinite(value) else None
