"""One entry point and one resolver for all implementations of the operator."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops import sdpa
from diffdeploy.ops.auto import fastest
from diffdeploy.ops.flash2 import flash2, require_flash2
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import Visibility, visibility
from diffdeploy.ops.naive import chunked, naive

__all__ = ["diff_attention", "resolve_impl"]


_Decomposition = Callable[[Tensor, Tensor, Tensor, Tensor, Visibility, GqaLayout], Tensor]

_IMPLEMENTATIONS: dict[Impl, _Decomposition] = {
    Impl.NAIVE: naive,
    Impl.CHUNKED: chunked,
    Impl.TWO_CALL: sdpa.two_call,
    Impl.PADDED: sdpa.padded,
    Impl.FOUR_CALL: sdpa.four_call,
    Impl.STACKED_SPLIT: sdpa.stacked_split,
    Impl.STACKED_WIDE: sdpa.stacked_wide,
}


_HALVE_VALUES = (Impl.FOUR_CALL, Impl.STACKED_SPLIT)


def resolve_impl(impl: Impl | str) -> Impl:
    """The implementation of that name; ``auto`` stays, and looks at the tensors later.

    Raises:
        InputError: ``impl`` is not an implementation.
    """
    if impl not in list(Impl):
        raise InputError(f"attention implementation {str(impl)!r} is not known; accepted: {', '.join(Impl)}")
    return Impl(impl)


def diff_attention(
    q_BHSd: Tensor,
    k_BHTd: Tensor,
    v_BHTe: Tensor,
    lam: Tensor,
    *,
    causal: bool,
    attn_mask: Tensor | None = None,
    sliding_window: int | None = None,
    gqa_layout: GqaLayout = "canonical",
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Differential attention of every head (arXiv 2410.05258, equation 1).

    ``softmax(q1 k1^T / sqrt(d)) v - lam softmax(q2 k2^T / sqrt(d)) v``; the two streams of a head are neighbours.
    A query that sees no key gives 0.

    Args:
        q_BHSd: queries ``[B, 2h, S, d]``, head ``i`` stream ``s`` at ``2i + s``.
        k_BHTd: keys ``[B, 2 h_kv, T, d]`` in the same order, or ``[B, h_kv, T, d]`` when both streams read the same.
        v_BHTe: values ``[B, h_kv, T, e]``; ``e`` is ``2d`` in the paper, ``d`` in the second version.
        lam: scalar, or ``[B, h, S, 1]``; rounded once to the dtype of ``q``.
        causal: query ``i`` of ``S`` sees keys up to ``T - S + i``.
        attn_mask: boolean (``True`` is seen) or additive, broadcastable to ``[B, 1 or h or 2h, S, T]``.
        sliding_window: of those, only the last ``sliding_window`` keys; needs ``causal``.
        gqa_layout: which key stream a query stream reads when ``h_kv < h``; see `DiffAttentionConfig`.
        impl: which implementation; ``auto`` takes the fastest one measured.

    Returns:
        ``[B, h, S, e]`` in the dtype of ``q``.

    Raises:
        InputError: shapes or a mask that do not fit, or something that the implementation asked for cannot do.
        UnavailableError: the implementation asked for cannot run here.
    """
    _check_shapes(q_BHSd, k_BHTd, v_BHTe)
    lam = lam.to(q_BHSd.dtype)
    resolved = resolve_impl(impl)
    if resolved == Impl.AUTO:
        resolved = fastest(q_BHSd, k_BHTd)
    if resolved == Impl.FLASH2:
        require_flash2(q_BHSd, v_BHTe)
        return flash2(
            q_BHSd,
            k_BHTd,
            v_BHTe,
            lam,
            causal=causal,
            key_padding=_key_padding(attn_mask, q_BHSd, k_BHTd.shape[2]),
            sliding_window=sliding_window,
            gqa_layout=gqa_layout,
        )
    if resolved in _HALVE_VALUES and v_BHTe.shape[-1] % 2:
        raise InputError(f"{resolved.value} halves the values, and their width {v_BHTe.shape[-1]} is odd")
    seen = visibility(q_BHSd, k_BHTd, causal=causal, attn_mask=attn_mask, sliding_window=sliding_window)
    return _IMPLEMENTATIONS[resolved](q_BHSd, k_BHTd, v_BHTe, lam, seen, gqa_layout)


def _check_shapes(q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> None:
    if any(side.ndim != 4 for side in (q_BHSd, k_BHTd, v_BHTe)):
        raise InputError("queries, keys and values must have four axes: batch, heads, positions, channels")
    half_heads, key_heads, kv_heads = (side.shape[1] for side in (q_BHSd, k_BHTd, v_BHTe))
    fits = (
        half_heads % 2 == 0
        and key_heads in (kv_heads, 2 * kv_heads)
        and (half_heads // 2) % kv_heads == 0
        and k_BHTd.shape[-1] == q_BHSd.shape[-1]
        and k_BHTd.shape[2] == v_BHTe.shape[2]
        and q_BHSd.shape[0] == k_BHTd.shape[0] == v_BHTe.shape[0]
    )
    if not fits:
        raise InputError(
            f"queries {list(q_BHSd.shape)}, keys {list(k_BHTd.shape)} and values {list(v_BHTe.shape)} do not fit; "
            "accepted are [B, 2h, S, d], [B, 2 h_kv or h_kv, T, d] and [B, h_kv, T, e] with h_kv a divisor of h"
        )


def _key_padding(attn_mask: Tensor | None, q_BHSd: Tensor, key_length: int) -> Tensor | None:
    """The mask as ``[B, T]``, if it only hides keys.

    Raises:
        InputError: FlashAttention-2 cannot express the mask.
    """
    if attn_mask is None:
        return None
    shape = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if attn_mask.dtype != torch.bool or shape[1:] != (1, 1, key_length):
        raise InputError(
            f"flash2 takes masks that hide keys from all queries alike, boolean [B, 1, 1, {key_length}], and this one "
            f"is {attn_mask.dtype} {list(attn_mask.shape)}"
        )
    return attn_mask.reshape(-1, key_length).expand(q_BHSd.shape[0], key_length)
