"""One entry point and one resolver for all implementations of the operator."""

from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops import flash2, fused, naive, paired, sdpa
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.registry import cheapest, implementation
from diffdeploy.ops.request import HeadNorm, Request

__all__ = ["IMPLEMENTATION_MODULES", "diff_attention", "resolve_impl"]

# Each module registers its implementations when it is imported.
IMPLEMENTATION_MODULES = (naive, sdpa, paired, flash2, fused)
_KNOWN = tuple(Impl)  # torch.compile in torch 2.11 cannot iterate over an enum


def resolve_impl(impl: Impl | str) -> Impl:
    """Look up an implementation by name; ``auto`` is returned unchanged and resolved for each request.

    Raises:
        InputError: ``impl`` is not the name of an implementation.
    """
    if impl not in _KNOWN:
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
    scale: float | None = None,
    norm: HeadNorm | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Differential attention of every head (arXiv 2410.05258, equation 1).

    It is ``softmax(q1 k1^T / sqrt(d)) v - lam softmax(q2 k2^T / sqrt(d)) v``; the two streams of a head are adjacent.
    A fully masked query returns 0.

    Implementations that read paired keys without separating them (``padded``, ``paired``, ``rows``) need finite keys:
    with an infinite ``k1``, the stream that reads ``k2`` becomes NaN as well, see `diffdeploy.ops.rows`.

    Args:
        q_BHSd: queries ``[B, 2h, S, d]``, with stream ``s`` of head ``i`` at ``2i + s``.
        k_BHTd: keys ``[B, 2 h_kv, T, d]`` in the same order, or both streams side by side, ``[k1 | k2]``,
            ``[B, h_kv, T, 2d]``, or ``[B, h_kv, T, d]`` if both streams read the same keys.
        v_BHTe: values ``[B, h_kv, T, e]``; ``e`` is ``2d`` in the paper and ``d`` in Diff-Transformer-V2.
        lam: lambda, a scalar or ``[B or 1, h, S, 1]``; rounded once to the dtype of ``q``.
        causal: true if query ``i`` of ``S`` attends only to keys up to ``T - S + i``.
        attn_mask: boolean (``True`` keeps a key) or additive mask, broadcastable to ``[B, 1 or h or 2h, S, T]``.
        sliding_window: size of the window: a query attends to at most this many of the most recent keys; requires
            ``causal``.
        gqa_layout: map from query streams to key streams when ``h_kv < h``; see `DiffAttentionConfig`.
        scale: factor of the scores; ``d ** -0.5`` by default.
        norm: per-head norm of the difference; none by default. ``fused`` computes it in the same kernel, in fp32.
        impl: name of the implementation; ``auto`` selects the fastest one by its measured cost.

    Returns:
        Outputs of the heads, ``[B, h, S, e]``, in the dtype of ``q``.

    Raises:
        InputError: shapes or the mask do not fit, or the chosen implementation does not support the request.
        UnavailableError: the chosen implementation cannot run on this machine.
    """
    request = Request.of(
        q_BHSd,
        k_BHTd,
        v_BHTe,
        lam,
        causal=causal,
        attn_mask=attn_mask,
        sliding_window=sliding_window,
        gqa_layout=gqa_layout,
        scale=scale,
        norm=norm,
    )
    resolved = resolve_impl(impl)
    chosen = cheapest(request) if resolved == Impl.AUTO else implementation(resolved)
    reason = chosen.why_not(request)
    if reason is not None:
        raise reason
    heads_BHSe = chosen.run(request)
    return heads_BHSe if norm is None or chosen.normalises else norm(heads_BHSe)
