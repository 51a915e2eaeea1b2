"""Sizes of a block, from the shapes of its tensors, held against the fields of ``config.json`` that name them."""

from typing import Any, NamedTuple

from diffdeploy.checkpoints.fields import Fields, typed_field
from diffdeploy.checkpoints.layouts import Layout
from diffdeploy.checkpoints.tensors import BlockTensors
from diffdeploy.errors import InputError

__all__ = ["Sizes", "read_sizes"]

_VECTOR, _MATRIX = 1, 2


class Sizes(NamedTuple):
    """Sizes of a block, found from shapes.

    Attributes:
        noise_repeat: heads that share one noise query in the file, see `Layout.noise_repeat`.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    noise_repeat: int = 1

    def of_config(self) -> dict[str, Any]:
        """Those that a config has, by its names."""
        return {name: getattr(self, name) for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim")}


def read_sizes(tensors: BlockTensors, layout: Layout, fields: Fields) -> Sizes:
    """Sizes from shapes alone: ``config.json`` may be missing, and where it is there it may only agree.

    Raises:
        InputError: shapes that do not fit each other, or a field that contradicts them.
    """
    q_rows, embed_dim = tensors.shape("q_proj.weight", _MATRIX)
    k_rows, _ = tensors.shape("k_proj.weight", _MATRIX)
    if layout.sources["q_proj.weight"].part is not None:
        # A packed projection says only the sum of its rows: those of q are the columns of the output projection, and k
        # and v share the rest equally.
        columns = tensors.shape("out_proj.weight", _MATRIX)[1]
        q_rows, k_rows = columns, (k_rows - columns) // 2
    head_dim = _head_dim(tensors, layout, q_rows)
    repeat = 1 if layout.noise_repeat is None else layout.noise_repeat(fields)
    sizes = Sizes(
        embed_dim,
        num_heads=repeat * _count(tensors, "q_proj.weight", q_rows, (repeat + 1) * head_dim),
        num_kv_heads=_count(tensors, "k_proj.weight", k_rows, head_dim if layout.streams_share_keys else 2 * head_dim),
        head_dim=head_dim,
        noise_repeat=repeat,
    )
    for field, (name, factor) in layout.head_fields.items():
        stated, found = typed_field(fields, field, int), factor * getattr(sizes, name)
        if name == "num_heads" and repeat > 1:
            found = sizes.num_heads // repeat * (repeat + 1)
        if stated is not None and stated != found:
            raise InputError(f"{field} in config.json is {stated}, but the weights have {found}; one is wrong")
    return sizes


def _head_dim(tensors: BlockTensors, layout: Layout, q_rows: int) -> int:
    """Stream width, from what lambda is made of: rows of q tell only the product of width and heads."""
    if not layout.constant_lambda:
        num_heads = tensors.shape("lambda_proj.weight", _MATRIX)[0]
        return q_rows // (2 * num_heads)
    if tensors.sources["lambda_q1"].scalar:
        # Lambda as a number has no width; the norm spans both streams.
        return tensors.shape("subln.weight", _VECTOR)[0] // 2
    return tensors.shape("lambda_q1", _VECTOR)[0]


def _count(tensors: BlockTensors, name: str, rows: int, width: int) -> int:
    """Heads in the rows of a projection."""
    if width == 0 or rows % width:
        raise InputError(
            f"{tensors.key(name)} has {rows} rows; accepted is a multiple of {width}, as the shapes of lambda say"
        )
    return rows // width
