"""The forward passes of the code bases that checkpoints come from, by their own head numbering, in loops and fp64.

Written from descriptions of those projects. Each says, in the source's numbering, which row block of q, k and v a
stream of a head reads; nothing is permuted to a canonical order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests import oracles

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Shape:
    embed_dim: int
    heads: int
    kv_heads: int
    width: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Reads:
    """Row blocks of width ``d`` that stream ``s`` of head ``i`` reads: one of q, one of k, two of v."""

    q: Callable[[Shape, int, int], int]
    k: Callable[[Shape, int, int], int]
    v: Callable[[Shape, int, int], tuple[int, int]]


def _pair_values(shape: Shape, i: int, s: int) -> tuple[int, int]:
    return 2 * (i // shape.group), 2 * (i // shape.group) + 1


# Flash modules, Phi-4-mini-flash, Motif, timm: neighbours are the two streams of a head.
PAIRS = Reads(lambda c, i, s: 2 * i + s, lambda c, i, s: 2 * (i // c.group) + s, _pair_values)
# Microsoft's naive module and multihead-sdpadiff repeat all key half heads before they are split.
REPEATED = Reads(lambda c, i, s: 2 * i + s, lambda c, i, s: (2 * i + s) // c.group, _pair_values)
# DiffLlama: 2h ordinary heads, the second half of which is noise; values are cut in halves of heads and repeated.
HALVES = Reads(
    lambda c, i, s: s * c.heads + i,
    lambda c, i, s: (s * c.heads + i) // c.group,
    lambda c, i, s: (
        ((s * c.heads + i) // c.group) % c.kv_heads,
        ((s * c.heads + i) // c.group) % c.kv_heads + c.kv_heads,
    ),
)


def forward(
    x: Array,
    shape: Shape,
    reads: Reads,
    projections: tuple[Array, Array, Array],
    lam: float,
    lambda_init: float,
    *,
    output: tuple[Array, Any],
    gamma: Any = 1.0,
    rope: tuple[str, float] | None = None,
    causal: bool = True,
    window: int | None = None,
    eps: float = 1e-5,
    head_norms: tuple[Array, Array] | None = None,
) -> Array:
    """One sequence ``[S, D]``; ``projections`` are the rows ``[S, n d]`` of q, k and v, biases included."""
    q, k, v = (rows.reshape(len(x), -1, shape.width) for rows in projections)
    if head_norms is not None:
        q, k = (
            side / np.sqrt((side**2).mean(-1, keepdims=True) + 1e-6) * weight
            for side, weight in zip((q, k), head_norms, strict=True)
        )
    if rope is not None:
        q, k = (np.stack([oracles.rotate(side[:, n], *rope) for n in range(side.shape[1])], 1) for side in (q, k))
    seen = oracles.visible(len(x), len(x), causal=causal, window=window) > 0
    joined = []
    for i in range(shape.heads):
        streams = []
        for s in (0, 1):
            value = np.concatenate([v[:, n] for n in reads.v(shape, i, s)], axis=1)
            scores = q[:, reads.q(shape, i, s)] @ k[:, reads.k(shape, i, s)].T / np.sqrt(shape.width)
            streams.append(
                np.stack([oracles.softmax_row(row[mask]) @ value[mask] for row, mask in zip(scores, seen, strict=True)])
            )
        head = streams[0] - lam * streams[1]
        head = head / np.sqrt((head**2).mean(-1, keepdims=True) + eps) * gamma
        joined.append(head * (1 - lambda_init))
    weight, bias = output
    result: Array = np.concatenate(joined, axis=1) @ weight.T + bias
    return result
