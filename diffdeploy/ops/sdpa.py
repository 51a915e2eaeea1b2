"""Decompositions into ``scaled_dot_product_attention``, which has fused kernels and is supported by exporters.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width (2d in the paper, d in
Diff-Transformer-V2, or as the model defines it).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.errors import InputError
from diffdeploy.ops.heads import JOINED_AXES_BECOME_GUARDS, equal_widths, repeat_heads, separate_streams
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import Visibility, kernel_mask
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Keys, Phase, Request
from diffdeploy.ops.rows import attend_rows, padded_queries
from diffdeploy.ops.target import runs_on_cuda

__all__ = ["attend", "four_call", "padded", "stacked_split", "stacked_wide", "two_call"]

# Number of scores of one stream, in elements, that fit into the processor's caches.
_CACHED_SCORES_FP16 = 2**21


def attend(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility, scale: float) -> Tensor:
    """Compute one softmax attention."""
    grouped = q_BHSd.shape[1] != k_BHTd.shape[1]
    if grouped and _must_gather_groups(q_BHSd, v_BHTe):
        num_heads, grouped = q_BHSd.shape[1], False
        read = torch.arange(num_heads, device=q_BHSd.device) // (num_heads // k_BHTd.shape[1])
        k_BHTd, v_BHTe = (side.index_select(1, read) for side in (k_BHTd, v_BHTe))
    output = F.scaled_dot_product_attention(
        q_BHSd,
        k_BHTd,
        v_BHTe,
        attn_mask=kernel_mask(q_BHSd, seen.mask),
        is_causal=seen.is_causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return seen.clear_dead(output)


def _must_gather_groups(q_BHSd: Tensor, v_BHTe: Tensor) -> bool:
    """True if key and value heads are to be repeated by gathering, since torch's own way is slow or adds guards."""
    # No fused CUDA kernel supports grouped heads in float32; torch would fall back to plain matrix products.
    in_float32_on_cuda = q_BHSd.dtype == torch.float32 and runs_on_cuda(q_BHSd)
    # For widths without a fused kernel, torch repeats heads by joining axes; torch.onnx keeps the call unchanged.
    exported_by_joining_axes = (
        q_BHSd.shape[-1] != v_BHTe.shape[-1] and torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()
    )
    return in_float32_on_cuda or (JOINED_AXES_BECOME_GUARDS and exported_by_joining_axes)


def _two_streams(request: Request, v_BHTe: Tensor, *, equal: bool = False) -> Tensor:
    """Compute one attention per stream, with widths made ``equal`` by padding or left as they are."""
    seen, num_heads = request.visibility(), request.num_heads
    streams = []
    for stream in (0, 1):
        sides = (request.q[:, stream::2], *request.stream_heads(stream, v_BHTe))
        output = attend(*(equal_widths(*sides) if equal else sides), seen.of_stream(stream, num_heads), request.scale)
        streams.append(output[..., : v_BHTe.shape[-1]])
    return streams[0] - request.lam * streams[1]


def _halves_values(request: Request) -> InputError | None:
    """Error that explains why the values cannot be halved; ``None`` if they can."""
    if request.value_width % 2 == 0:
        return None
    return InputError(f"this implementation halves the values, but their width {request.value_width} is odd")


# Costs from docs/operator-speed.md at 2048 positions: on CUDA in bfloat16 (h 8, d 64), on the CPU in float32.
@register(Impl.TWO_CALL, num_attentions=2, cost=lambda request: 0.11 if request.device == "cuda" else 1.4)
def two_call(request: Request) -> Tensor:
    """Compute ``sdpa(q1, k1, v) - lam sdpa(q2, k2, v)`` as two calls. See `diff_attention` for shapes."""
    return _two_streams(request, request.v)


def _padded_cost(request: Request) -> float:
    if request.device == "cuda":
        return 0.15
    # Padding copies the keys of a cache, or reads paired keys twice, which dominates the time per token.
    return 1.8 if request.phase == Phase.DECODE else 0.7


@register(Impl.PADDED, num_attentions=2, cost=_padded_cost)
def padded(request: Request) -> Tensor:
    """Compute `two_call` with q and k zero-padded to the width of v, for kernels that require equal widths.

    This is exact: the zeros add nothing to ``q k^T``, and the scale stays ``d ** -0.5``. Paired keys are not copied:
    both streams read all of them, with queries ``[q1 | 0]`` and ``[0 | q2]``; see `diffdeploy.ops.rows` for keys that
    are not finite. See `diff_attention` for shapes.
    """
    if request.keys != Keys.PAIRED:
        return _two_streams(request, request.v, equal=True)
    q_BHSe, seen = padded_queries(request), request.visibility()
    # CPU kernels of torch and onnxruntime expand grouped keys; CUDA kernels support groups in half precision.
    grouped = runs_on_cuda(q_BHSe) and request.dtype != torch.float32
    one_stream = attend if grouped else attend_rows
    q_BHSe, keys, values = equal_widths(q_BHSe, request.k, request.v)
    signal, noise = (
        one_stream(
            q_BHSe[:, stream::2],
            keys,
            values,
            seen.of_stream(stream, request.num_heads),
            request.scale,
        )[..., : request.value_width]
        for stream in (0, 1)
    )
    return signal - request.lam * noise


@register(
    Impl.FOUR_CALL,
    num_attentions=4,
    supports=_halves_values,
    cost=lambda request: 0.2 if request.device == "cuda" else 0.9,
)
def four_call(request: Request) -> Tensor:
    """Compute `two_call` for each half of the values, so that all widths are ``d``. See `diff_attention` for shapes."""
    return torch.cat([_two_streams(request, half) for half in request.v.chunk(2, dim=-1)], dim=-1)


@register(
    Impl.STACKED_SPLIT,
    num_attentions=1,
    supports=_halves_values,
    cost=lambda request: 0.17 if request.device == "cuda" else 0.9,
)
def stacked_split(request: Request) -> Tensor:
    """Compute `four_call` as one call of ``4h`` heads: streams 1, 1, 2, 2 with value halves 1, 2, 1, 2.

    See `diff_attention` for shapes.
    """
    seen = request.visibility()
    queries, keys, values, masks = [], [], [], []
    for stream in (0, 1):
        k_stream, v_stream = request.stream_heads(stream)
        for half in v_stream.chunk(2, dim=-1):
            queries.append(request.q[:, stream::2])
            keys.append(k_stream)
            values.append(half)
            masks.append(seen.of_stream(stream, request.num_heads))
    output = attend(
        torch.cat(queries, dim=1),
        torch.cat(keys, dim=1),
        torch.cat(values, dim=1),
        Visibility.stack(masks),
        request.scale,
    )
    signal_1, signal_2, noise_1, noise_2 = output.chunk(4, dim=1)
    lam = request.lam
    return torch.cat((signal_1 - lam * noise_1, signal_2 - lam * noise_2), dim=-1)


def _stacked_wide_cost(request: Request) -> float:
    if request.device == "cuda":
        return 0.09
    if request.dtype != torch.float16 or request.traced:
        return 1.4
    # Matrix products are slow in float16 on the CPU; one call is faster if its scores fit into the caches.
    scores = request.q.shape[0] * request.num_heads * request.length * request.key_length
    return 0.6 if scores < _CACHED_SCORES_FP16 else 1.4


@register(Impl.STACKED_WIDE, num_attentions=1, cost=_stacked_wide_cost)
def stacked_wide(request: Request) -> Tensor:
    """Compute `two_call` as one call of ``2h`` heads. Values are copied, once per stream, unless keys are shared.

    Keys are not copied, unless they are paired: then they are separated first. Query heads are ordered so that heads
    reading the same key head are neighbours: by key head, stream and member of the group in the canonical layout; in
    natural order in the legacy layout and for shared keys. See `diff_attention` for shapes.
    """
    q_BHSd, k_BHTd, v_BHTe, lam = request.q, request.k, request.v, request.lam
    num_heads, num_kv_heads = request.num_heads, request.num_kv_heads
    seen = request.visibility().of_half_heads(num_heads)
    if request.keys == Keys.PAIRED:
        k_BHTd = separate_streams(k_BHTd)
    if request.keys != Keys.SHARED:
        v_BHTe = repeat_heads(v_BHTe, 2)
        if request.gqa_layout == "canonical" and num_heads != num_kv_heads:
            natural = torch.arange(2 * num_heads, device=q_BHSd.device)
            order = natural.reshape(num_kv_heads, -1, 2).transpose(1, 2).flatten()
            output = attend(q_BHSd.index_select(1, order), k_BHTd, v_BHTe, seen.reorder(order), request.scale)
            # Gathering avoids a reshape that would join axes: see JOINED_AXES_BECOME_GUARDS.
            by_stream = natural.reshape(num_kv_heads, 2, -1).transpose(0, 1).flatten()
            signal, noise = output.index_select(1, by_stream).chunk(2, dim=1)
            return signal - lam * noise
    output = attend(q_BHSd, k_BHTd, v_BHTe, seen, request.scale)
    return output[:, 0::2] - lam * output[:, 1::2]
