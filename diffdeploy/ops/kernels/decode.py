"""The kernels for few queries: keys are split among programs, and a second kernel combines the parts.

A program handles one part of the keys of one key/value head, and all queries that read it: both streams of all heads
of its group, at all positions. Each position and half head is a row; positions come first. The scores of both streams
are one matrix: the query of a row is replaced by zeros for the keys of the other stream.
"""

import triton
import triton.language as tl

from diffdeploy.ops.kernels.tiles import finish, not_padding, read, softmax_step, visible

__all__ = ["combine", "split"]


# fmt: off
@triton.jit(do_not_specialize=["S", "T", "window", "keys_of_split", "splits"])
def split(
    q, k, v, padding, sums_out, tops_out, totals_out, HKV, G, S, T, scale, window, keys_of_split, splits,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kstream, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_pb,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr,
    LEGACY: tl.constexpr, SHARED: tl.constexpr,
):
    """Compute sums ``[B, h_kv, splits, rows, e]``, maxima and totals ``[.., rows]`` over a part of the keys."""
    scale = tl.cast(scale, tl.float32)
    num_rows = 2 * G * S
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    part = tl.program_id(0) % splits
    slot = tl.program_id(0) // splits
    first_row = slot % row_tiles * BLOCK_M
    kv = slot // row_tiles % HKV
    batch = (slot // row_tiles // HKV).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    real = rows < num_rows
    position = rows // (2 * G)
    half = rows % (2 * G)
    columns = tl.arange(0, BLOCK_D)
    at = q + batch * stride_qb + (kv * 2 * G + half).to(tl.int64)[:, None] * stride_qh
    at += position.to(tl.int64)[:, None] * stride_qs + columns[None, :]
    queries = tl.load(at, mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if LEGACY:
        second = half // G == 1
    else:
        second = half % 2 == 1
    none = tl.zeros([BLOCK_M, BLOCK_D], queries.dtype)
    q1 = tl.where(second[:, None], none, queries)
    q2 = tl.where(second[:, None], queries, none)
    k1 = k + batch * stride_kb + kv.to(tl.int64) * stride_kh
    k2 = k1 + stride_kstream
    v += batch * stride_vb + kv.to(tl.int64) * stride_vh
    padding += batch * stride_pb
    newest = position + (T - S)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    start = part * keys_of_split
    end = tl.minimum(T, start + keys_of_split)
    if WINDOW:
        oldest = tl.maximum(0, first_row // (2 * G) + T - S + 1 - window)
        start = tl.maximum(start, oldest // BLOCK_N * BLOCK_N)
    for first in tl.range(start, end, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        tokens = not_padding(padding, first, T, BLOCK_N, PADDING)
        seen = visible(first, newest, tokens, T, window, BLOCK_N, True, CAUSAL, WINDOW, PADDING)
        keys = tl.trans(read(k1, first, T, stride_kt, WIDTH, BLOCK_D, BLOCK_N, False))
        if SHARED:
            scores = tl.dot(queries, keys)
        else:
            scores = tl.dot(q1, keys)
            keys = tl.trans(read(k2, first, T, stride_kt, WIDTH, BLOCK_D, BLOCK_N, False))
            scores = tl.dot(q2, keys, scores)
        weights, kept, top, total = softmax_step(scores, top, total, scale, seen, True)
        values = read(v, first, T, stride_vt, VALUE_WIDTH, BLOCK_E, BLOCK_N, False)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
    to = ((batch * HKV + kv) * splits + part) * num_rows + rows
    tl.store(tops_out + to, top, mask=real)
    tl.store(totals_out + to, total, mask=real)
    columns = tl.arange(0, BLOCK_E)
    tl.store(sums_out + to[:, None] * VALUE_WIDTH + columns[None, :], sums,
             mask=real[:, None] & (columns < VALUE_WIDTH)[None, :])


@triton.jit
def _weights(tops, totals, at, there, base):
    """Weights of parts relative to the largest maximum, and the totals of these parts, weighted."""
    weights = tl.math.exp2(tl.load(tops + at, mask=there, other=float("-inf")) - base)
    return weights, weights * tl.load(totals + at, mask=there, other=0.0)


@triton.jit
def _merged(
    sums, tops, totals, first, row_stride, splits,
    VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Combine the parts of two adjacent rows into softmax attentions ``[1, e]``; ``first`` is the first row in part 0.

    Maxima are read first, in a separate loop, and both rows are read together, so that few loads wait for earlier ones.
    """
    columns = tl.arange(0, BLOCK_E)
    top1 = float("-inf")
    top2 = float("-inf")
    for start in tl.range(0, splits, BLOCK_N):
        parts = start + tl.arange(0, BLOCK_N)
        at = first + parts * row_stride
        top1 = tl.maximum(top1, tl.max(tl.load(tops + at, mask=parts < splits, other=float("-inf")), 0))
        top2 = tl.maximum(top2, tl.max(tl.load(tops + at + 1, mask=parts < splits, other=float("-inf")), 0))
    base1 = tl.where(top1 == float("-inf"), 0.0, top1)
    base2 = tl.where(top2 == float("-inf"), 0.0, top2)
    total1 = tl.zeros([BLOCK_N], tl.float32)
    total2 = tl.zeros([BLOCK_N], tl.float32)
    sum1 = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    sum2 = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in tl.range(0, splits, BLOCK_N):
        parts = start + tl.arange(0, BLOCK_N)
        at = first + parts * row_stride
        there = (parts < splits)[:, None] & (columns < VALUE_WIDTH)[None, :]
        of_part = sums + at[:, None] * VALUE_WIDTH + columns[None, :]
        weights1, part1 = _weights(tops, totals, at, parts < splits, base1)
        weights2, part2 = _weights(tops, totals, at + 1, parts < splits, base2)
        sum1 += weights1[:, None] * tl.load(of_part, mask=there, other=0.0)
        sum2 += weights2[:, None] * tl.load(of_part + VALUE_WIDTH, mask=there, other=0.0)
        total1 += part1
        total2 += part2
    whole1 = tl.sum(total1, 0)
    whole2 = tl.sum(total2, 0)
    signal = tl.sum(sum1, 0)[None, :] / tl.where(whole1 == 0.0, 1.0, whole1)
    noise = tl.sum(sum2, 0)[None, :] / tl.where(whole2 == 0.0, 1.0, whole2)
    return signal, noise


@triton.jit(do_not_specialize=["S", "splits"])
def combine(
    sums, tops, totals, lam, norm, out, H, G, S, splits, eps, factor,
    stride_ob, stride_oh, stride_os, stride_lb, stride_lh, stride_ls,
    VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
):
    """Compute one head at one position: combine the parts, subtract the second stream times lambda, and normalise."""
    eps, factor = tl.cast(eps, tl.float32), tl.cast(factor, tl.float32)
    head = tl.program_id(0) % H
    position = tl.program_id(0) // H % S
    batch = (tl.program_id(0) // H // S).to(tl.int64)
    num_rows = 2 * G * S
    row = position * 2 * G + 2 * (head % G)
    first = (batch * (H // G) + head // G) * splits * num_rows + row
    signal, noise = _merged(sums, tops, totals, first, num_rows, splits, VALUE_WIDTH, BLOCK_E, BLOCK_N)
    share = tl.load(lam + batch * stride_lb + head.to(tl.int64) * stride_lh + position * stride_ls).to(tl.float32)
    difference = finish(signal - share * noise, norm, eps, factor, VALUE_WIDTH, BLOCK_E, NORM, GAMMA)
    columns = tl.arange(0, BLOCK_E)
    at = out + batch * stride_ob + head.to(tl.int64) * stride_oh + position * stride_os + columns[None, :]
    tl.store(at, difference.to(out.dtype.element_ty), mask=(columns < VALUE_WIDTH)[None, :])
