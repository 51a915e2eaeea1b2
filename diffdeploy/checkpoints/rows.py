"""Bit-exact reordering of rows between layouts and canonical weights, in both directions."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffdeploy.checkpoints.layouts import Layout, Source
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import LAMBDA_VECTORS
from diffdeploy.errors import InputError

__all__ = ["by_halves", "centred_values", "from_canonical", "to_canonical", "turned_back"]


def _heads(name: str, sizes: Sizes) -> int:
    return sizes.num_heads if name.startswith("q") else sizes.num_kv_heads


def _part_rows(source: Source, sizes: Sizes) -> list[int]:
    """Number of rows of each part of a packed projection, in order."""
    whole = {
        "q": 2 * sizes.num_heads * sizes.head_dim,
        "k": sizes.num_kv_heads * sizes.key_dim,
        "v": sizes.num_kv_heads * sizes.value_dim,
    }
    letters = [part[0] for part in source.order]
    return [whole[letter] // letters.count(letter) for letter in letters]


def _has_halves(name: str, source: Source, sizes: Sizes) -> bool:
    # Values as wide as one stream are not split into halves, whatever the order of queries and keys.
    return source.halves and (not name.startswith("v") or sizes.value_dim != sizes.head_dim)


def _pairs_from_halves(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows ``[2, n, d]`` to ``[n, 2, d]``."""
    return tensor.reshape(2, heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _halves_from_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows ``[n, 2, d]`` to ``[2, n, d]``."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _repeat_noise(tensor: Tensor, sizes: Sizes) -> Tensor:
    """Expand rows ``[n, repeat + 1, d]``, noise last, to ``[n, repeat, 2, d]``: each signal with the shared noise."""
    repeat = sizes.noise_repeat
    groups = tensor.reshape(-1, repeat + 1, sizes.head_dim, *tensor.shape[1:])
    signal, noise = groups[:, :repeat], groups[:, repeat:]
    return torch.stack((signal, noise.expand_as(signal)), dim=2).reshape(-1, *tensor.shape[1:])


def _share_noise(name: str, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Invert `_repeat_noise`.

    Raises:
        InputError: heads that must share a noise query have different ones.
    """
    repeat = sizes.noise_repeat
    pairs = tensor.reshape(-1, repeat, 2, sizes.head_dim, *tensor.shape[1:])
    signal, noise = pairs[:, :, 0], pairs[:, :, 1]
    if not torch.equal(noise, noise[:, :1].expand_as(noise)):
        raise InputError(f"{name} has different noise rows in each head; {repeat} heads cannot share one noise query")
    return torch.cat((signal, noise[:, :1]), dim=1).reshape(-1, *tensor.shape[1:])


def to_canonical(sources: Mapping[str, Source], get: Callable[[str], Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Convert the weights of a layout to canonical ones.

    Args:
        sources: sources of the weights that the block has.
        get: function that reads a tensor by its key without the prefix.
        sizes: sizes of the block.
    """
    loaded: dict[str, Tensor] = {}
    weights = {}
    for name, source in sources.items():
        # A packed projection is read once for all of its parts.
        if source.key not in loaded:
            loaded[source.key] = get(source.key)
        tensor = loaded[source.key]
        if source.order:
            parts = dict(zip(source.order, torch.split(tensor, _part_rows(source, sizes)), strict=True))
            tensor = torch.cat([parts[part] for part in source.parts])
        if _has_halves(name, source, sizes):
            tensor = _pairs_from_halves(tensor, _heads(name, sizes))
        if sizes.noise_repeat > 1 and name.startswith("q_proj"):
            tensor = _repeat_noise(tensor, sizes)
        if source.scalar:
            # The inner product of (x, 0, ...) and (1, 0, ...) is x.
            weights[name] = torch.zeros(sizes.head_dim, dtype=tensor.dtype)
            weights[name][0] = tensor
            weights[name.replace("_q", "_k")] = torch.eye(1, sizes.head_dim, dtype=tensor.dtype)[0]
            continue
        # A view would keep the whole packed projection alive, and safetensors refuses to write one.
        weights[name] = tensor.contiguous()
    return weights


def centred_values(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Weights for which an RMS norm of the heads gives the same result as a LayerNorm gives for the given weights.

    A head is linear in its values, so its mean is zero if the mean over each value head's rows is subtracted. This is
    exact, but not reversible. Half precision becomes float32, which can represent the differences.
    """
    changed = dict(weights)
    for name in ("v_proj.weight", "v_proj.bias"):
        if name in weights:
            tensor = weights[name]
            heads = tensor.double().reshape(sizes.num_kv_heads, -1, *tensor.shape[1:])
            centred = (heads - heads.mean(dim=1, keepdim=True)).reshape(tensor.shape)
            changed[name] = centred.to(torch.promote_types(tensor.dtype, torch.float32))
    return changed


def turned_back(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Weights that give the same scores with positive angles as the given ones with negative angles.

    Rotate-half rotates the pairs ``(x[j], x[j + d/2])``; negating the second channel of each pair reverses the angle.
    This is exact and its own inverse, and has no effect on norms of queries and keys.
    """
    changed = dict(weights)
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"):
        if name in weights:
            tensor = weights[name]
            pairs = tensor.reshape(-1, 2, sizes.head_dim // 2, *tensor.shape[1:])
            changed[name] = torch.stack((pairs[:, 0], -pairs[:, 1]), dim=1).reshape(tensor.shape)
    return changed


def by_halves(weights: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Weights that give the same scores with rotate-half rotation as the given ones with interleaved rotation.

    Interleaved rotation uses the pairs ``(x[2j], x[2j + 1])`` of a stream, rotate-half ``(x[j], x[j + d/2])``, with the
    same angles; scores do not depend on the order of channels. This is exact.

    Args:
        weights: weights of a block without norms of queries and keys.
        head_dim: stream width ``d``, all of which is rotated.
    """
    changed = dict(weights)
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"):
        if name in weights:
            tensor = weights[name]
            pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
            changed[name] = pairs.transpose(1, 2).reshape(tensor.shape)
    return changed


def from_canonical(layout: Layout, weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Convert canonical weights to those of a layout; the inverse of `to_canonical`.

    Raises:
        InputError: the layout cannot store a weight or the form of lambda.
    """
    sources = {**layout.sources, **layout.optional}
    scalars = [name for name, source in layout.sources.items() if source.scalar]
    # The partner that `to_canonical` adds to the vector of a scalar is a unit vector and has no key.
    carried = {name.replace("_q", "_k") for name in scalars}
    if missing := sorted(weights.keys() - sources.keys() - carried):
        raise InputError(f"layout {layout.name} has no place for {', '.join(missing)}")
    if absent := sorted(layout.sources.keys() - weights.keys()):
        raise InputError(f"layout {layout.name} needs {', '.join(absent)}, which this block does not have")
    packed: dict[str, dict[str, Tensor]] = {}
    orders: dict[str, tuple[str, ...]] = {}
    result: dict[str, Tensor] = {}
    for name, source in sources.items():
        if name not in weights:
            continue
        tensor = weights[name]
        if _has_halves(name, source, sizes):
            tensor = _halves_from_pairs(tensor, _heads(name, sizes))
        if sizes.noise_repeat > 1 and name.startswith("q_proj"):
            tensor = _share_noise(name, tensor, sizes)
        if source.scalar:
            result[source.key] = _as_scalar(tensor, weights[name.replace("_q", "_k")], layout)
        elif not source.order:
            result[source.key] = tensor.contiguous()
        else:
            chunks = tensor.chunk(len(source.parts))
            packed.setdefault(source.key, {}).update(zip(source.parts, chunks, strict=True))
            orders[source.key] = source.order
    # Packed projections come last, since their parts arrive one by one.
    return result | {key: torch.cat([packed[key][part] for part in order]) for key, order in orders.items()}


def _as_scalar(vector: Tensor, partner: Tensor, layout: Layout) -> Tensor:
    # The product of any two vectors is a number, too, but reading it would return other vectors.
    if vector[1:].any() or partner[1:].any() or partner[0] != 1:
        raise InputError(
            f"layout {layout.name} stores the exponents of lambda as numbers, but this block has vectors: "
            f"{', '.join(LAMBDA_VECTORS)}"
        )
    return vector[0].clone()
