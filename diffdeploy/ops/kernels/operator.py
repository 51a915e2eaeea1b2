"""The kernels as the operator ``diffdeploy::fused_attention``, which compilers decompose and exporters do not."""

from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffdeploy.ops.kernels.call import Call
from diffdeploy.ops.kernels.decode import combine, split
from diffdeploy.ops.kernels.prefill import prefill, subtract

__all__ = ["attend_into", "output_buffer", "scratch"]

_LOG2_E = 1.4426950408889634
# Kernels compute offsets within a tile of up to 128 rows in 32 bits.
_FARTHEST_ROWS = 2**31 // 128


def _launcher(kernel: Any) -> Any:
    """Wrap a kernel for use in graphs; functions of Triton's interpreter, which torch rejects, stay unchanged."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def output_buffer(call: Call) -> Tensor:
    """Uninitialised output ``[B, S, h, e]``; the heads of a position are adjacent, as their concatenation requires."""
    batch, _, length, _ = call.q.shape
    return call.q.new_empty(batch, length, call.num_heads, call.v.shape[3])


def scratch(call: Call) -> tuple[Tensor, ...]:
    """Uninitialised buffers: sums, maxima and totals of all parts of the keys; or results of both streams; or none."""
    if call.apart:
        batch, _, length, _ = call.q.shape
        # Two results of wide values would not stay in the cache in fp32.
        dtype = call.q.dtype if call.wide else torch.float32
        shape = (2, batch, length, call.num_heads, call.v.shape[3])
        return (torch.empty(shape, dtype=dtype, device=call.q.device),)
    if not call.decodes:
        return ()
    batch, kv_heads, _, value_width = call.v.shape
    rows = batch * kv_heads * call.num_splits() * call.most_rows
    # The buffers have one axis, since inductor copies buffers whose strides it cannot prove to be dense.
    sums, tops, totals = (
        torch.empty(size, dtype=torch.float32, device=call.q.device) for size in (rows * value_width, rows, rows)
    )
    return sums, tops, totals


def attend_into(out_BSHe: Tensor, parts: tuple[Tensor, ...], call: Call) -> None:
    """Fill a buffer from `output_buffer`, using the buffers from `scratch`."""
    if call.decodes:
        _attend_split(out_BSHe, parts, call)
        return
    target = parts[0] if call.apart else out_BSHe
    if call.tma and not call.traced:
        # This runs in a separate context, so that a caller's allocator is not replaced.
        copy_context().run(_attend_with_workspace, target, call)
    else:
        _attend_tiles(target, call)
    if call.apart:
        _subtract(out_BSHe, target, call)


def _attend_with_workspace(target: Tensor, call: Call) -> None:
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=target.device))
    _attend_tiles(target, call)


def _attend_tiles(target: Tensor, call: Call) -> None:
    """Run `prefill` and write to the output, or to the buffer of both streams."""
    batch, length, num_heads, _ = target.shape[-4:]
    (padding, padding_stride), (norm, eps), lam, tile = call.padding(), call.norm_settings(), call.lambdas(), call.tile
    programs = batch * num_heads * triton.cdiv(length, tile.rows)
    _launcher(prefill)[(call.programs(2 * programs if call.apart else programs),)](
        *(call.q, call.k, call.v, lam, norm, padding, target, num_heads, call.group_size, length, call.k.shape[2]),
        *(call.heads_at_once(), call.scale * _LOG2_E, call.window or 0, eps, call.factor),
        *call.input_strides(),
        target.stride(0) if call.apart else 0,
        *_output_strides(target),
        *lam.stride()[:3],
        padding_stride,
        **call.widths,
        **call.flags(),
        **call.epilogue(),
        **tile.options(),
        TURNS=call.wide and not call.apart,
        APART=call.apart,
        TMA=call.tma,
        MULTIPROCESSORS=call.pairing(),
    )


def _subtract(out_BSHe: Tensor, streams: Tensor, call: Call) -> None:
    batch, length, num_heads, _ = out_BSHe.shape
    (norm, eps), lam, widths, rows = call.norm_settings(), call.lambdas(), call.widths, 16
    _launcher(subtract)[(batch * num_heads * triton.cdiv(length, rows),)](
        *(streams, lam, norm, out_BSHe, num_heads, length, eps, call.factor, streams.stride(0)),
        *_output_strides(out_BSHe),
        *lam.stride()[:3],
        VALUE_WIDTH=widths["VALUE_WIDTH"],
        BLOCK_E=widths["BLOCK_E"],
        BLOCK_M=rows,
        **call.epilogue(),
        num_warps=4,
        num_stages=1,
    )


def _attend_split(out_BSHe: Tensor, parts: tuple[Tensor, ...], call: Call) -> None:
    batch, length, num_heads, _ = out_BSHe.shape
    kv_heads, key_length, splits, tile = call.v.shape[1], call.k.shape[2], call.num_splits(), call.tile
    (padding, padding_stride), (norm, eps), lam, widths = (
        call.padding(),
        call.norm_settings(),
        call.lambdas(),
        call.widths,
    )
    keys_of_split = triton.cdiv(triton.cdiv(key_length, tile.keys), splits) * tile.keys
    _launcher(split)[(call.programs(batch * kv_heads * triton.cdiv(call.num_rows, tile.rows) * splits),)](
        *(call.q, call.k, call.v, padding, *parts, kv_heads, call.group_size, length, key_length),
        *(call.scale * _LOG2_E, call.window or 0, keys_of_split, splits),
        *call.input_strides(),
        padding_stride,
        **widths,
        **call.flags(),
        **tile.options(),
    )
    _launcher(combine)[(call.programs(batch * num_heads * length),)](
        *(*parts, lam, norm, out_BSHe, num_heads, call.group_size, length, splits, eps, call.factor),
        *_output_strides(out_BSHe),
        *lam.stride()[:3],
        VALUE_WIDTH=widths["VALUE_WIDTH"],
        BLOCK_E=widths["BLOCK_E"],
        BLOCK_N=call.parts_at_once(splits),
        **call.epilogue(),
        num_warps=8,
        num_stages=1,
    )


def _output_strides(buffer: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and position, which are the fourth-, second- and third-last axes."""
    return buffer.stride(-4), buffer.stride(-2), buffer.stride(-3)


def _with_dense_rows(side: Tensor) -> Tensor:
    """Copy a tensor if the channels of a row are not adjacent, or if rows are too far apart for 32-bit offsets."""
    step = side.stride(-2)
    near = not isinstance(step, int) or step < _FARTHEST_ROWS
    return side if side.stride(-1) == 1 and near else side.contiguous()


@triton_op("diffdeploy::fused_attention", mutates_args=())
def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    key_padding: Tensor | None,
    norm: Tensor | None,
    causal: bool,
    window: int | None,
    legacy: bool,
    scale: float,
    eps: float | None,
    factor: float,
) -> Tensor:
    q, k, v = (_with_dense_rows(side) for side in (q, k, v))
    key_padding = None if key_padding is None else _with_dense_rows(key_padding)
    traced = _launcher(prefill) is not prefill  # outside of a trace, wrap_triton returns the kernel unchanged
    call = Call(q, k, v, lam, key_padding, norm, causal, window, legacy, scale, eps, factor, traced)
    out_BSHe = output_buffer(call)
    for each in call.by_length():
        attend_into(out_BSHe, scratch(each), each)
    return out_BSHe.transpose(1, 2)


# Shape and strides of the result for a trace, which runs no kernel.
_fused_attention.register_fake(
    lambda q, _k, v, *_others: q.new_empty(q.shape[0], q.shape[2], q.shape[1] // 2, v.shape[3]).transpose(1, 2)
)
