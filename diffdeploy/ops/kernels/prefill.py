"""The kernel for many queries: a program handles one tile of queries of one head, and reads their keys once.

Both streams are computed together if their accumulators fit in the registers. Otherwise, they take turns, and the
first result is stored in the output meanwhile. If multiprocessors would be idle, each stream has separate programs,
and `subtract` combines their results.
"""

import triton
import triton.language as tl

from diffdeploy.ops.kernels.tiles import finish, not_padding, read, softmax_step, visible

__all__ = ["prefill", "subtract"]


# fmt: off
@triton.jit
def _together(
    start, end, sum1, sum2, top1, top2, total1, total2, q1, q2, k1, k2, v, newest, padding, T, stride_k, stride_v,
    scale, window, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BAND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Process keys ``start .. end`` for both streams; each tile of keys and values is loaded once."""
    masked: tl.constexpr = BAND or PADDING
    for first in tl.range(start, end, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        tokens = not_padding(padding, first, T, BLOCK_N, PADDING)
        keys = tl.trans(read(k1, first, T, stride_k, WIDTH, BLOCK_D, BLOCK_N, not BAND))
        scores1 = tl.dot(q1, keys)
        if not SHARED:
            keys = tl.trans(read(k2, first, T, stride_k, WIDTH, BLOCK_D, BLOCK_N, not BAND))
        scores2 = tl.dot(q2, keys)
        seen = True
        if masked:
            seen = visible(first, newest, tokens, T, window, BLOCK_N, BAND, CAUSAL, WINDOW, PADDING)
        weights1, kept1, top1, total1 = softmax_step(scores1, top1, total1, scale, seen, masked)
        values = read(v, first, T, stride_v, VALUE_WIDTH, BLOCK_E, BLOCK_N, not BAND)
        sum1 = tl.dot(weights1.to(values.dtype), values, sum1 * kept1[:, None])
        weights2, kept2, top2, total2 = softmax_step(scores2, top2, total2, scale, seen, masked)
        sum2 = tl.dot(weights2.to(values.dtype), values, sum2 * kept2[:, None])
    return sum1, sum2, top1, top2, total1, total2


@triton.jit
def _one_stream(
    start, end, sums, top, total, q, k, v, newest, padding, T, stride_k, stride_v, scale, window, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, TMA: tl.constexpr,
):
    """Process keys ``start .. end`` for one stream."""
    masked: tl.constexpr = BAND or PADDING
    for first in tl.range(start, end, BLOCK_N):
        first = tl.multiple_of(first, BLOCK_N)
        tokens = not_padding(padding, first, T, BLOCK_N, PADDING)
        if TMA:
            keys = k.load([first, 0])
        else:
            keys = read(k, first, T, stride_k, WIDTH, BLOCK_D, BLOCK_N, not BAND)
        scores = tl.dot(q, tl.trans(keys))
        seen = True
        if masked:
            seen = visible(first, newest, tokens, T, window, BLOCK_N, BAND, CAUSAL, WINDOW, PADDING)
        weights, kept, top, total = softmax_step(scores, top, total, scale, seen, masked)
        if TMA:
            values = v.load([first, 0])
        else:
            values = read(v, first, T, stride_v, VALUE_WIDTH, BLOCK_E, BLOCK_N, not BAND)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
    return sums, top, total


@triton.jit
def _whole_stream(
    start, inner_start, inner_end, end, q, k, v, newest, padding, T, stride_k, stride_v, scale, window,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, TMA: tl.constexpr,
):
    """Softmax attention of one stream."""
    if TMA:
        k = tl.make_tensor_descriptor(k, [T, WIDTH], [stride_k, 1], [BLOCK_N, BLOCK_D])
        v = tl.make_tensor_descriptor(v, [T, VALUE_WIDTH], [stride_v, 1], [BLOCK_N, BLOCK_E])
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if WINDOW:
        sums, top, total = _one_stream(
            start, inner_start, sums, top, total, q, k, v, newest, padding, T, stride_k, stride_v, scale, window,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, PADDING, TMA,
        )
    sums, top, total = _one_stream(
        inner_start, inner_end, sums, top, total, q, k, v, newest, padding, T, stride_k, stride_v, scale, window,
        WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, False, CAUSAL, WINDOW, PADDING, TMA,
    )
    sums, top, total = _one_stream(
        inner_end, end, sums, top, total, q, k, v, newest, padding, T, stride_k, stride_v, scale, window,
        WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, PADDING, TMA,
    )
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _both_streams(
    start, inner_start, inner_end, end, q1, q2, k1, k2, v, newest, padding, T, stride_k, stride_v, scale, window,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, SHARED: tl.constexpr,
):
    """Softmax attention of both streams."""
    top1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total1 = tl.zeros([BLOCK_M], tl.float32)
    total2 = tl.zeros([BLOCK_M], tl.float32)
    sum1 = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    sum2 = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if WINDOW:
        sum1, sum2, top1, top2, total1, total2 = _together(
            start, inner_start, sum1, sum2, top1, top2, total1, total2, q1, q2, k1, k2, v, newest, padding,
            T, stride_k, stride_v, scale, window,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, PADDING, SHARED,
        )
    sum1, sum2, top1, top2, total1, total2 = _together(
        inner_start, inner_end, sum1, sum2, top1, top2, total1, total2, q1, q2, k1, k2, v, newest, padding,
        T, stride_k, stride_v, scale, window,
        WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, False, CAUSAL, WINDOW, PADDING, SHARED,
    )
    sum1, sum2, top1, top2, total1, total2 = _together(
        inner_end, end, sum1, sum2, top1, top2, total1, total2, q1, q2, k1, k2, v, newest, padding,
        T, stride_k, stride_v, scale, window,
        WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_N, True, CAUSAL, WINDOW, PADDING, SHARED,
    )
    signal = sum1 / tl.where(total1 == 0.0, 1.0, total1)[:, None]
    noise = sum2 / tl.where(total2 == 0.0, 1.0, total2)[:, None]
    return signal, noise


@triton.jit
def _ranges(
    first, S, T, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Keys of a tile of queries: from ``start`` to ``end``, of which all queries see ``inner_start .. inner_end``.

    All but ``end`` are multiples of ``BLOCK_N``.
    """
    start = 0
    inner_start = 0
    inner_end = T // BLOCK_N * BLOCK_N
    end = T
    if CAUSAL:
        newest_of_first = first + T - S
        newest_of_last = tl.minimum(first + BLOCK_M, S) - 1 + T - S
        end = tl.maximum(0, tl.minimum(T, newest_of_last + 1))
        inner_end = tl.minimum(inner_end, tl.maximum(0, newest_of_first + 1) // BLOCK_N * BLOCK_N)
        if WINDOW:
            start = tl.maximum(0, newest_of_first + 1 - window) // BLOCK_N * BLOCK_N
            inner_start = tl.cdiv(tl.maximum(0, newest_of_last + 1 - window), BLOCK_N) * BLOCK_N
    # If no tile is entirely visible, the last range covers all keys.
    if inner_start >= inner_end:
        inner_start = start
        inner_end = start
    return start, inner_start, inner_end, end


@triton.jit
def _place(S, H, heads_at_once, MULTIPROCESSORS: tl.constexpr, BLOCK_M: tl.constexpr, APART: tl.constexpr):
    """Batch, head, stream and first query of a program. The grid has one axis, since the others are limited to 65,535.

    Programs process one group of heads, whose keys and values stay in the L2 cache, before the next. Within a group,
    the same tile of all heads comes before the next tile, and tiles with the most keys come first, which fills the
    last wave of a causal problem. If all programs run at once, two on each multiprocessor, the second programs of
    the multiprocessors are in the opposite order, so that the longest program runs beside the shortest one.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if MULTIPROCESSORS > 0:
        second = (program >= MULTIPROCESSORS) & (programs <= 2 * MULTIPROCESSORS)
        program = tl.where(second, programs - 1 - (program - MULTIPROCESSORS), program)
    stream = program * 0
    if APART:
        stream = program % 2
        program //= 2
        programs //= 2
    tiles = tl.cdiv(S, BLOCK_M)
    first_head = program // (tiles * heads_at_once) * heads_at_once
    among = tl.minimum(heads_at_once, programs // tiles - first_head)
    program -= first_head * tiles
    head = first_head + program % among
    first = (tiles - 1 - program // among) * BLOCK_M
    return (head // H).to(tl.int64), head % H, stream, first


@triton.jit(do_not_specialize=["S", "T", "window", "heads_at_once"])
def prefill(
    q, k, v, lam, norm, padding, out, H, G, S, T, heads_at_once, scale, window, eps, factor, stride_qb, stride_qh,
    stride_qs, stride_kb, stride_kh, stride_kstream, stride_kt, stride_vb, stride_vh, stride_vt, stride_ostream,
    stride_ob, stride_oh, stride_os, stride_lb, stride_lh, stride_ls, stride_pb, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, LEGACY: tl.constexpr,
    SHARED: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, TURNS: tl.constexpr, APART: tl.constexpr,
    TMA: tl.constexpr, MULTIPROCESSORS: tl.constexpr,
):
    """Compute one tile of queries of one head or, if ``APART``, of one of its streams."""
    # Inductor passes numbers in double precision.
    scale, eps, factor = tl.cast(scale, tl.float32), tl.cast(eps, tl.float32), tl.cast(factor, tl.float32)
    batch, head, stream, first = _place(S, H, heads_at_once, MULTIPROCESSORS, BLOCK_M, APART)
    key1 = 2 * (head // G)
    key2 = key1 + 1
    if LEGACY:
        key1 = 2 * head // G
        key2 = (2 * head + 1) // G
    q += batch * stride_qb + (2 * head).to(tl.int64) * stride_qh
    k += batch * stride_kb
    k1 = k + (key1 // 2).to(tl.int64) * stride_kh + (key1 % 2).to(tl.int64) * stride_kstream
    k2 = k + (key2 // 2).to(tl.int64) * stride_kh + (key2 % 2).to(tl.int64) * stride_kstream
    v += batch * stride_vb + (head // G).to(tl.int64) * stride_vh
    padding += batch * stride_pb
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    real = (rows < S)[:, None] & (columns < VALUE_WIDTH)[None, :]
    out += batch * stride_ob + head.to(tl.int64) * stride_oh
    at = out + first.to(tl.int64) * stride_os + (tl.arange(0, BLOCK_M)[:, None] * stride_os + columns[None, :])
    newest = rows + (T - S)
    start, inner_start, inner_end, end = _ranges(first, S, T, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
    if APART:
        q += stream * stride_qh
        k1 = tl.where(stream == 0, k1, k2)
        out += stream.to(tl.int64) * stride_ostream
        at += stream.to(tl.int64) * stride_ostream
    q1 = read(q, first, S, stride_qs, WIDTH, BLOCK_D, BLOCK_M, False)
    if APART or TURNS:
        signal = _whole_stream(
            start, inner_start, inner_end, end, q1, k1, v, newest, padding, T, stride_kt, stride_vt, scale, window,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PADDING, TMA,
        )
        tl.store(at, signal.to(out.dtype.element_ty), mask=real)
    if TURNS:
        q2 = read(q + stride_qh, first, S, stride_qs, WIDTH, BLOCK_D, BLOCK_M, False)
        noise = _whole_stream(
            start, inner_start, inner_end, end, q2, k2, v, newest, padding, T, stride_kt, stride_vt, scale, window,
            WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PADDING, TMA,
        )
        # Another thread of the same program may have stored what a thread reads here.
        tl.debug_barrier()
        signal = tl.load(at, mask=real, other=0.0).to(tl.float32)
        tl.debug_barrier()
    elif not APART:
        q2 = read(q + stride_qh, first, S, stride_qs, WIDTH, BLOCK_D, BLOCK_M, False)
        signal, noise = _both_streams(
            start, inner_start, inner_end, end, q1, q2, k1, k2, v, newest, padding, T, stride_kt, stride_vt, scale,
            window, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, PADDING, SHARED,
        )
    if not APART:
        lam += batch * stride_lb + head.to(tl.int64) * stride_lh
        share = tl.load(lam + rows.to(tl.int64) * stride_ls, mask=rows < S, other=0.0).to(tl.float32)
        difference = finish(signal - share[:, None] * noise, norm, eps, factor, VALUE_WIDTH, BLOCK_E, NORM, GAMMA)
        tl.store(at, difference.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["S"])
def subtract(
    streams, lam, norm, out, H, S, eps, factor, stride_stream, stride_ob, stride_oh, stride_os, stride_lb, stride_lh,
    stride_ls, VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, NORM: tl.constexpr,
    GAMMA: tl.constexpr,
):
    """Compute the difference and its norm for some positions of one head; strides are those of the output."""
    eps, factor = tl.cast(eps, tl.float32), tl.cast(factor, tl.float32)
    tiles = tl.cdiv(S, BLOCK_M)
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    real = (rows < S)[:, None] & (columns < VALUE_WIDTH)[None, :]
    at = batch * stride_ob + head.to(tl.int64) * stride_oh + rows.to(tl.int64)[:, None] * stride_os + columns[None, :]
    signal = tl.load(streams + at, mask=real, other=0.0).to(tl.float32)
    noise = tl.load(streams + tl.cast(stride_stream, tl.int64) + at, mask=real, other=0.0).to(tl.float32)
    lam += batch * stride_lb + head.to(tl.int64) * stride_lh
    share = tl.load(lam + rows.to(tl.int64) * stride_ls, mask=rows < S, other=0.0).to(tl.float32)
    difference = finish(signal - share[:, None] * noise, norm, eps, factor, VALUE_WIDTH, BLOCK_E, NORM, GAMMA)
    tl.store(out + at, difference.to(out.dtype.element_ty), mask=real)
