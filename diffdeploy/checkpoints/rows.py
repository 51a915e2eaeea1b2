"""Row maps between layouts and canonical weights, in both directions, bit for bit."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdeploy.checkpoints.layouts import Layout, Source
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import LAMBDA_VECTORS
from diffdeploy.errors import InputError

__all__ = ["from_canonical", "to_canonical"]


def _heads(name: str, sizes: Sizes) -> int:
    return sizes.num_heads if name.startswith("q") else sizes.num_kv_heads


def _part_rows(sizes: Sizes) -> dict[str, int]:
    # Every layout that packs is of version 1, whose values are as wide as a pair of streams.
    width = 2 * sizes.head_dim
    return {"q": sizes.num_heads * width, "k": sizes.num_kv_heads * width, "v": sizes.num_kv_heads * width}


def _pairs_from_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows ``[2, n, d]`` to ``[n, 2, d]``."""
    return tensor.reshape(2, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _halves_from_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows ``[n, 2, d]`` to ``[2, n, d]``."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def to_canonical(sources: Mapping[str, Source], get: Callable[[str], Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Canonical weights from those of a layout.

    Args:
        sources: of the weights that the block has.
        get: a tensor by its key behind the prefix.
        sizes: of the block.
    """
    loaded: dict[str, Tensor] = {}
    weights = {}
    for name, source in sources.items():
        # Once for all parts of a packed projection.
        if source.key not in loaded:
            loaded[source.key] = get(source.key)
        tensor = loaded[source.key]
        if source.part is not None:
            rows = _part_rows(sizes)
            tensor = torch.split(tensor, list(rows.values()))["qkv".index(source.part)]
        if source.halves:
            tensor = _pairs_from_halves(tensor, _heads(name, sizes))
        if source.scalar:
            # The inner product of (x, 0, ...) and (1, 0, ...) is x.
            weights[name] = torch.zeros(sizes.head_dim, dtype=tensor.dtype)
            weights[name][0] = tensor
            weights[name.replace("_q", "_k")] = torch.eye(1, sizes.head_dim, dtype=tensor.dtype)[0]
            continue
        # A view of a packed projection would keep the whole of it alive, and safetensors refuses to write one.
        weights[name] = tensor.contiguous()
    return weights


def from_canonical(layout: Layout, weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Weights of a layout from canonical ones; the inverse of `to_canonical`.

    Raises:
        InputError: the layout has no place for a weight, or no such form of lambda.
    """
    sources = {**layout.sources, **layout.optional}
    scalars = [name for name, source in layout.sources.items() if source.scalar]
    # The partner of a scalar's vector is the unit vector that `to_canonical` made, and has no key of its own.
    carried = {name.replace("_q", "_k") for name in scalars}
    if missing := sorted(weights.keys() - sources.keys() - carried):
        raise InputError(f"layout {layout.name} has no place for {', '.join(missing)}")
    if absent := sorted(layout.sources.keys() - weights.keys()):
        raise InputError(f"layout {layout.name} needs {', '.join(absent)}, which this block does not have")
    packed: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, source in sources.items():
        if name not in weights:
            continue
        tensor = weights[name]
        if source.halves:
            tensor = _halves_from_pairs(tensor, _heads(name, sizes))
        if source.scalar:
            result[source.key] = _as_scalar(tensor, weights[name.replace("_q", "_k")], layout)
        elif source.part is None:
            result[source.key] = tensor.contiguous()
        else:
            packed.setdefault(source.key, {})[source.part] = tensor
    # Last, since the parts of a packed projection arrive one by one.
    return result | {key: torch.cat([parts[part] for part in "qkv"]) for key, parts in packed.items()}


def _as_scalar(vector: Tensor, partner: Tensor, layout: Layout) -> Tensor:
    # The product of any two vectors is a number too, but it would come back as other vectors: not bit for bit.
    if vector[1:].any() or partner[1:].any() or partner[0] != 1:
        raise InputError(
            f"layout {layout.name} holds the exponents of lambda as numbers, and this block has vectors: "
            f"{', '.join(LAMBDA_VECTORS)}"
        )
    return vector[0].clone()
