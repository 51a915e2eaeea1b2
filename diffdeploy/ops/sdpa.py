"""Decompositions into ``scaled_dot_product_attention``, which fused kernels and exporters understand.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e = 2d value width.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

__all__ = ["padded", "two_call"]


def _stream(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, causal: bool, scale: float) -> Tensor:
    """One softmax attention; causal is aligned bottom-right, where SDPA's own flag is aligned top-left."""
    query_length, key_length = q_BHSd.shape[-2], k_BHTd.shape[-2]
    square = bool(query_length == key_length)
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BHTd,
        v_BHTe,
        attn_mask=causal_lower_right(query_length, key_length) if causal and not square else None,
        is_causal=causal and square,
        scale=scale,
        enable_gqa=q_BHSd.shape[1] != k_BHTd.shape[1],
    )


def two_call(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, causal: bool) -> Tensor:
    """Two calls with value width ``2d``: ``sdpa(q1, k1, v) - lam sdpa(q2, k2, v)``. See `diff_attention` for shapes."""
    scale = q_BHSd.shape[-1] ** -0.5
    signal, noise = (_stream(q_BHSd[:, s::2], k_BHTd[:, s::2], v_BHTe, causal, scale) for s in (0, 1))
    return signal - lam * noise


def padded(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, causal: bool) -> Tensor:
    """`two_call` with q and k zero-padded to ``2d``, for kernels that want equal widths.

    Exact: the zeros add nothing to ``q k^T``, and the scale stays ``d ** -0.5``. See `diff_attention` for shapes.
    """
    width = q_BHSd.shape[-1]
    q_BHSe, k_BHTe = F.pad(q_BHSd, (0, width)), F.pad(k_BHTd, (0, width))
    signal, noise = (_stream(q_BHSe[:, s::2], k_BHTe[:, s::2], v_BHTe, causal, width**-0.5) for s in (0, 1))
    return signal - lam * noise
