"""Sizes of a block from the shapes of its tensors, checked against the fields of ``config.json`` that state them."""

from typing import Any, NamedTuple

from diffdeploy.checkpoints.fields import Fields, typed_field
from diffdeploy.checkpoints.layouts import Layout
from diffdeploy.checkpoints.tensors import BlockTensors
from diffdeploy.errors import InputError

__all__ = ["Sizes", "read_sizes"]

_VECTOR, _MATRIX = 1, 2


class Sizes(NamedTuple):
    """Sizes of a block, determined from shapes.

    Attributes:
        embed_dim: model width, see `DiffAttentionConfig`.
        num_heads: number of differential heads.
        num_kv_heads: number of key/value heads.
        head_dim: stream width.
        value_dim: width of a head's values.
        key_dim: width of all keys of a key/value head.
        noise_repeat: number of heads that share one noise query in the file, see `Layout.noise_repeat`.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    key_dim: int
    noise_repeat: int = 1

    def of_config(self) -> dict[str, Any]:
        """The sizes that are fields of a config, by name."""
        return {name: getattr(self, name) for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim")}


def read_sizes(tensors: BlockTensors, layout: Layout, fields: Fields) -> Sizes:
    """Determine sizes from shapes alone: ``config.json`` is optional, but must agree if present.

    Raises:
        InputError: shapes do not fit each other, or a field contradicts them.
    """
    embed_dim = tensors.shape("q_proj.weight", _MATRIX)[1]
    rows = {name: tensors.shape(f"{name}_proj.weight", _MATRIX)[0] for name in ("q", "k", "v")}
    _unpack_rows(rows, tensors, layout)
    head_dim = _head_dim(tensors, layout, rows["q"])
    key_dim = head_dim if layout.streams_share_keys else 2 * head_dim
    repeat = 1 if layout.noise_repeat is None else layout.noise_repeat(fields)
    num_kv_heads = _count(tensors, "k_proj.weight", rows["k"], key_dim)
    sizes = Sizes(
        embed_dim,
        num_heads=repeat * _count(tensors, "q_proj.weight", rows["q"], (repeat + 1) * head_dim),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim={"pair": 2 * head_dim, "stream": head_dim, "rows": rows["v"] // num_kv_heads}[layout.values],
        key_dim=key_dim,
        noise_repeat=repeat,
    )
    for field, (name, streams) in layout.head_fields.items():
        factor = sizes.value_dim // head_dim if streams is None else streams
        stated, found = typed_field(fields, field, int), factor * getattr(sizes, name)
        if name == "num_heads" and repeat > 1:
            found = sizes.num_heads // repeat * (repeat + 1)
        if stated is not None and stated != found:
            raise InputError(f"{field} in config.json is {stated}, but the weights have {found}; one is wrong")
    return sizes


def _unpack_rows(rows: dict[str, int], tensors: BlockTensors, layout: Layout) -> None:
    """Replace the row count of packed projections, which is a sum, with the row count of each projection."""
    order = layout.sources["k_proj.weight"].order
    if not order:
        return
    # A query part has as many rows as the output projection has columns: it contains both streams if values are twice
    # as wide as a stream, else one stream. Keys and values share the remaining rows equally.
    total, queries = rows["k"], [part for part in order if part[0] == "q"]
    columns = tensors.shape("out_proj.weight", _MATRIX)[1]
    of_keys, of_values = (sum(part[0] == letter for part in order) for letter in "kv")
    one = (total - columns * len(queries)) // (of_keys + of_values)
    # The only layout with a part for each stream has no grouped key/value heads; without this check, it would accept
    # ordinary attention.
    alike = len(queries) <= 1 or one == columns
    if one < 1 or not alike or columns * len(queries) + one * (of_keys + of_values) != total:
        raise InputError(
            f"{tensors.key('k_proj.weight')} has {total} rows; accepted: the rows of {', '.join(order)}, where "
            f"each query part has {columns}, the number of columns of {tensors.key('out_proj.weight')}"
        )
    if queries:
        rows["q"] = columns * len(queries)
    rows["k"], rows["v"] = one * of_keys, one * of_values


def _head_dim(tensors: BlockTensors, layout: Layout, q_rows: int) -> int:
    """Stream width from the shape of lambda, since rows of q show only the product of width and heads."""
    if layout.lambda_kind == "token":
        num_heads = tensors.shape("lambda_proj.weight", _MATRIX)[0]
        return q_rows // (2 * num_heads)
    if layout.lambda_kind == "fixed":
        return tensors.shape("q_norm.weight", _VECTOR)[0]
    if tensors.sources["lambda_q1"].scalar:
        # Lambda as a single number shows no width, but the norm spans both streams.
        return tensors.shape("subln.weight", _VECTOR)[0] // 2
    return tensors.shape("lambda_q1", _MATRIX if layout.lambda_kind == "head" else _VECTOR)[-1]


def _count(tensors: BlockTensors, name: str, rows: int, width: int) -> int:
    """Number of heads in the rows of a projection."""
    if width == 0 or rows % width:
        raise InputError(
            f"{tensors.key(name)} has {rows} rows; accepted: a multiple of {width}, to match the shapes of lambda"
        )
    return rows // width
