"""Common parts of the kernels: tiles of rows, visibility of keys, a step of the softmax, and the norm.

Names in kernels: ``WIDTH`` and ``VALUE_WIDTH`` are ``d`` and ``e``, and ``BLOCK_D`` and ``BLOCK_E`` are the powers of
two that hold them. ``BLOCK_M`` and ``BLOCK_N`` are the numbers of queries and keys in a tile, ``S`` and ``T`` are
lengths, and ``G`` is the number of heads that read a key/value head.
"""

import triton
import triton.language as tl

__all__ = ["finish", "not_padding", "read", "softmax_step", "visible"]


@triton.jit
def read(
    base, first, length, stride, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Load rows ``first .. first + BLOCK`` of ``[length, WIDTH]``, with zeros beyond its bounds.

    With ``WHOLE``, all rows are below ``length``. Offsets within the tile have 32 bits, which saves registers.
    """
    columns = tl.arange(0, BLOCK_W)
    rows = first + tl.arange(0, BLOCK)
    at = base + tl.cast(first, tl.int64) * stride + (tl.arange(0, BLOCK)[:, None] * stride + columns[None, :])
    if WHOLE:
        if WIDTH == BLOCK_W:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_W:
        tile = tl.load(at, mask=(rows < length)[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=(rows < length)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def not_padding(padding, first, T, BLOCK_N: tl.constexpr, PADDING: tl.constexpr):
    """Load the token mask of a tile, before the scores are computed, so that they need not wait for it."""
    tokens = True
    if PADDING:
        columns = first + tl.arange(0, BLOCK_N)
        tokens = tl.load(padding + columns, mask=columns < T, other=False)
    return tokens


@triton.jit
def visible(
    first,
    newest,
    tokens,
    T,
    window,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Mask of the keys of a tile that each row sees; ``newest`` is the last key that causality allows.

    Without ``BAND``, causality and the window hide no key of the tile.
    """
    columns = first + tl.arange(0, BLOCK_N)
    seen = (columns < T)[None, :]
    if BAND and CAUSAL:
        seen = seen & (columns[None, :] <= newest[:, None])
    if BAND and WINDOW:
        seen = seen & (columns[None, :] > newest[:, None] - window)
    if PADDING:
        seen = seen & tokens[None, :]
    return seen


@triton.jit
def softmax_step(scores, top, total, scale, seen, MASKED: tl.constexpr):
    """One tile of the online softmax (arXiv 1805.02867), in powers of two: ``scale`` includes the factor ``log2 e``.

    Returns:
        Weights of the tile, the factor for the previous sums, the new maximum and the new sum. Masks are exact: a
        hidden key has the weight 0, and a row that has seen nothing keeps the sum 0.
    """
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if MASKED:
        # Minus infinity minus itself would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.math.exp2(scores * scale - base[:, None])
    kept = tl.math.exp2(top - base)
    return weights, kept, new_top, total * kept + tl.sum(weights, 1)


@triton.jit
def finish(
    difference,
    norm,
    eps,
    factor,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
):
    """RMS norm of each row over ``VALUE_WIDTH`` channels, gamma and factor (arXiv 2410.05258, equation 3)."""
    if NORM:
        # Channels beyond the width are 0 and add nothing.
        inverse = tl.math.rsqrt(tl.sum(difference * difference, 1) / VALUE_WIDTH + eps) * factor
        difference = difference * inverse[:, None]
        if GAMMA:
            columns = tl.arange(0, BLOCK_E)
            gamma = tl.load(norm + columns, mask=columns < VALUE_WIDTH, other=0.0)
            difference = difference * gamma.to(tl.float32)[None, :]
    return difference
