"""Inputs of the operator: heads, masks of every kind, and the masks as numbers for the formula."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import oracles

# All implementations that run on a CPU.
IMPLEMENTATIONS = [
    "naive",
    "chunked",
    "two_call",
    "padded",
    "four_call",
    "stacked_split",
    "stacked_wide",
    "paired",
    "rows",
]
HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (3, 1)]
CAUSAL = {"causal": True, "full": False}
PAIR = {"streams": False, "paired": True}
INFINITY = float("inf")


def random_inputs(
    heads: int, kv_heads: int, queries: int, keys: int, *, shared_keys: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * heads + 100 * kv_heads + keys)
    key_heads, value_width = (kv_heads, 4) if shared_keys else (2 * kv_heads, 8)
    shapes = [(2, 2 * heads, queries, 4), (2, key_heads, keys, 4), (2, kv_heads, keys, value_width)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def side_by_side(k: Tensor) -> Tensor:
    """Join key heads ``2j`` and ``2j + 1`` into one head of twice the width, as in a cache."""
    return torch.cat((k[:, ::2], k[:, 1::2]), dim=-1)


def masks(queries: int, keys: int, heads: int) -> dict[str, Tensor]:
    """Masks of every kind, by name; additive ones in fp64."""
    generator = torch.Generator().manual_seed(7)
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    left, right, ragged, all_hidden = (padding.clone() for _ in range(4))
    left[1, ..., : keys // 2] = False
    right[0, ..., keys // 2 :] = False
    ragged[0, ..., ::3] = False
    all_hidden[1] = False
    full = torch.rand(2, 1, queries, keys, generator=generator) > 0.4
    full[0, 0, queries // 2] = False
    per_head = torch.rand(1, heads, queries, keys, generator=generator) > 0.3
    per_half_head = torch.rand(2, 2 * heads, queries, keys, generator=generator) > 0.3
    additive = torch.randn(2, 1, queries, keys, generator=generator, dtype=torch.float64)
    additive[full.logical_not()] = -INFINITY
    return {
        "left": left,
        "right": right,
        "ragged": ragged,
        "all_hidden": all_hidden,
        "full": full,
        "rows_and_keys": full[0, 0],
        "per_head": per_head,
        "per_half_head": per_half_head,
        "additive": additive,
        "additive_per_head": torch.randn(2, heads, queries, keys, generator=generator, dtype=torch.float64),
    }


def bias_of(mask: Tensor | None, heads: int, *, causal: bool, window: int | None, queries: int, keys: int) -> Any:
    seen = oracles.visible(queries, keys, causal=causal, window=window)
    bias = np.where(seen > 0, 0.0, -np.inf)[None, None]
    if mask is None:
        return bias
    extra = mask.numpy() if mask.is_floating_point() else np.where(mask.numpy(), 0.0, -np.inf)
    extra = extra.reshape((1,) * (4 - extra.ndim) + extra.shape)
    return bias + (np.repeat(extra, 2, axis=1) if extra.shape[1] == heads else extra)
