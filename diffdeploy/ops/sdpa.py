"""Decompositions into ``scaled_dot_product_attention``, which fused kernels and exporters understand.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width (2d, or d in the second
version).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.ops.heads import shares_keys, stream_heads
from diffdeploy.ops.masks import Visibility
from diffdeploy.ops.target import runs_on_cuda

__all__ = ["four_call", "padded", "stacked_split", "stacked_wide", "two_call"]

# Before torch 2.13, torch.export does not know that min(6 s, 12 s) is 6 s, and makes a guard of it. Such minima are the
# strides of two axes that were joined.
_JOINED_AXES_BECOME_GUARDS = torch.__version__ < "2.13"  # TorchVersion compares versions


def _attend(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility, scale: float) -> Tensor:
    """One softmax attention."""
    grouped = q_BHSd.shape[1] != k_BHTd.shape[1]
    if grouped and _must_gather_groups(q_BHSd, v_BHTe):
        num_heads, grouped = q_BHSd.shape[1], False
        read = torch.arange(num_heads, device=q_BHSd.device) // (num_heads // k_BHTd.shape[1])
        k_BHTd, v_BHTe = (side.index_select(1, read) for side in (k_BHTd, v_BHTe))
    output = F.scaled_dot_product_attention(
        q_BHSd,
        k_BHTd,
        v_BHTe,
        attn_mask=seen.mask,
        is_causal=seen.is_causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return seen.clear_dead(output)


def _must_gather_groups(q_BHSd: Tensor, v_BHTe: Tensor) -> bool:
    """Whether torch cannot be left to repeat the key and value heads of a group."""
    # No fused kernel of CUDA takes groups in float32; torch would fall back to plain matrix products.
    in_float32_on_cuda = q_BHSd.dtype == torch.float32 and runs_on_cuda(q_BHSd)
    # Where no fused kernel takes the widths, torch repeats heads by joining axes; torch.onnx keeps the call as it is.
    exported_by_joining_axes = (
        q_BHSd.shape[-1] != v_BHTe.shape[-1] and torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()
    )
    return in_float32_on_cuda or (_JOINED_AXES_BECOME_GUARDS and exported_by_joining_axes)


def _two_streams(
    q_BHSd: Tensor,
    k_BHTd: Tensor,
    v_BHTe: Tensor,
    lam: Tensor,
    seen: Visibility,
    gqa_layout: GqaLayout,
    scale: float,
) -> Tensor:
    num_heads = q_BHSd.shape[1] // 2
    signal, noise = (
        _attend(
            q_BHSd[:, stream::2],
            *stream_heads(k_BHTd, v_BHTe, stream, num_heads, gqa_layout),
            seen.of_stream(stream, num_heads),
            scale,
        )
        for stream in (0, 1)
    )
    return signal - lam * noise


def two_call(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """Two calls with value width ``2d``: ``sdpa(q1, k1, v) - lam sdpa(q2, k2, v)``. See `diff_attention` for shapes."""
    return _two_streams(q_BHSd, k_BHTd, v_BHTe, lam, seen, gqa_layout, q_BHSd.shape[-1] ** -0.5)


def padded(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """`two_call` with q and k zero-padded to the width of v, for kernels that want equal widths.

    Exact: the zeros add nothing to ``q k^T``, and the scale stays ``d ** -0.5``. See `diff_attention` for shapes.
    """
    width = q_BHSd.shape[-1]
    padding = (0, v_BHTe.shape[-1] - width)
    q_BHSe, k_BHTe = F.pad(q_BHSd, padding), F.pad(k_BHTd, padding)
    return _two_streams(q_BHSe, k_BHTe, v_BHTe, lam, seen, gqa_layout, width**-0.5)


def four_call(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """`two_call` for each half of the values, so that all widths are ``d``. See `diff_attention` for shapes."""
    scale = q_BHSd.shape[-1] ** -0.5
    halves = v_BHTe.chunk(2, dim=-1)
    return torch.cat([_two_streams(q_BHSd, k_BHTd, v, lam, seen, gqa_layout, scale) for v in halves], dim=-1)


def stacked_split(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """`four_call` as one call of ``4h`` heads: streams 1, 1, 2, 2 with value halves 1, 2, 1, 2.

    See `diff_attention` for shapes.
    """
    num_heads = q_BHSd.shape[1] // 2
    queries, keys, values, masks = [], [], [], []
    for stream in (0, 1):
        k_stream, v_stream = stream_heads(k_BHTd, v_BHTe, stream, num_heads, gqa_layout)
        for half in v_stream.chunk(2, dim=-1):
            queries.append(q_BHSd[:, stream::2])
            keys.append(k_stream)
            values.append(half)
            masks.append(seen.of_stream(stream, num_heads))
    output = _attend(
        torch.cat(queries, dim=1),
        torch.cat(keys, dim=1),
        torch.cat(values, dim=1),
        Visibility.stack(masks),
        q_BHSd.shape[-1] ** -0.5,
    )
    signal_1, signal_2, noise_1, noise_2 = output.chunk(4, dim=1)
    return torch.cat((signal_1 - lam * noise_1, signal_2 - lam * noise_2), dim=-1)


def stacked_wide(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """`two_call` as one call of ``2h`` heads. Keys are not copied; values are, once per stream, unless keys are shared.

    Query heads are ordered so that those which read one key head are neighbours: key head, stream, member of the group
    in the canonical layout; natural order in the legacy one and where keys are shared. See `diff_attention` for shapes.
    """
    num_heads, num_kv_heads = q_BHSd.shape[1] // 2, v_BHTe.shape[1]
    scale = q_BHSd.shape[-1] ** -0.5
    seen = seen.of_half_heads(num_heads)
    if not shares_keys(k_BHTd, v_BHTe):
        v_BHTe = v_BHTe.repeat_interleave(2, dim=1)
        if gqa_layout == "canonical" and num_heads != num_kv_heads:
            natural = torch.arange(2 * num_heads, device=q_BHSd.device)
            order = natural.reshape(num_kv_heads, -1, 2).transpose(1, 2).flatten()
            output = _attend(q_BHSd.index_select(1, order), k_BHTd, v_BHTe, seen.reorder(order), scale)
            # Gathered, where a reshape would join axes: see _JOINED_AXES_BECOME_GUARDS.
            by_stream = natural.reshape(num_kv_heads, 2, -1).transpose(0, 1).flatten()
            signal, noise = output.index_select(1, by_stream).chunk(2, dim=1)
            return signal - lam * noise
    output = _attend(q_BHSd, k_BHTd, v_BHTe, seen, scale)
    return output[:, 0::2] - lam * output[:, 1::2]
