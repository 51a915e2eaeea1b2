"""The formula as the paper writes it: both probability matrices, their difference, then the values.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e = 2d value width.
"""

import torch
from torch import Tensor

__all__ = ["naive"]


def naive(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, causal: bool) -> Tensor:
    """``(P1 - lam P2) v`` with materialised probabilities; softmax in at least fp32, all else in the dtype of ``q``.

    Source: arXiv 2410.05258, equation 1. See `diff_attention` for shapes.
    """
    batch, _, key_length, width = k_BHTd.shape
    group_size = q_BHSd.shape[1] // k_BHTd.shape[1]
    k_BHTd = k_BHTd.reshape(batch, -1, 2, key_length, width).repeat_interleave(group_size, dim=1).flatten(1, 2)
    v_BHTe = v_BHTe.repeat_interleave(group_size, dim=1)
    scores_BHST = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
    if causal:
        query_length = q_BHSd.shape[-2]
        hidden = torch.ones(query_length, key_length, dtype=torch.bool, device=q_BHSd.device)
        scores_BHST = scores_BHST.masked_fill(hidden.triu(key_length - query_length + 1), float("-inf"))
    softmax_dtype = torch.promote_types(q_BHSd.dtype, torch.float32)
    probs_BHST = scores_BHST.softmax(dim=-1, dtype=softmax_dtype).to(q_BHSd.dtype)
    difference_BHST: Tensor = probs_BHST[:, 0::2] - lam * probs_BHST[:, 1::2]
    return difference_BHST @ v_BHTe
