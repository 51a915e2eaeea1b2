"""The formula as the paper writes it: both probability matrices, their difference, then the values.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility

__all__ = ["naive"]


def naive(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    """``(P1 - lam P2) v`` with materialised probabilities; softmax in at least fp32, all else in the dtype of ``q``.

    Source: arXiv 2410.05258, equation 1. See `diff_attention` for shapes.
    """
    num_heads = q_BHSd.shape[1] // 2
    signal, noise = (_probabilities(q_BHSd, k_BHTd, v_BHTe, stream, seen, gqa_layout) for stream in (0, 1))
    return (signal - lam * noise) @ v_BHTe.repeat_interleave(num_heads // v_BHTe.shape[1], dim=1)


def _probabilities(
    q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, stream: int, seen: Visibility, gqa_layout: GqaLayout
) -> Tensor:
    num_heads = q_BHSd.shape[1] // 2
    k_stream, _ = stream_heads(k_BHTd, v_BHTe, stream, num_heads, gqa_layout)
    k_stream = k_stream.repeat_interleave(num_heads // k_stream.shape[1], dim=1)
    scores_BHST = (q_BHSd[:, stream::2] * q_BHSd.shape[-1] ** -0.5) @ k_stream.transpose(-1, -2)
    seen = seen.of_stream(stream, num_heads)
    if seen.is_causal:
        hidden = torch.ones(scores_BHST.shape[-2:], dtype=torch.bool, device=q_BHSd.device).triu(1)
        scores_BHST = scores_BHST.masked_fill(hidden, float("-inf"))
    elif seen.mask is not None and seen.mask.dtype == torch.bool:
        scores_BHST = scores_BHST.masked_fill(~seen.mask, float("-inf"))
    elif seen.mask is not None:
        scores_BHST = scores_BHST + seen.mask
    softmax_dtype = torch.promote_types(q_BHSd.dtype, torch.float32)
    return seen.clear_dead(scores_BHST.softmax(dim=-1, dtype=softmax_dtype).to(q_BHSd.dtype))
