"""One entry point and one resolver for all implementations of the operator."""

from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops import flash2, fused, naive, paired, sdpa
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.registry import cheapest, implementation
from diffdeploy.ops.request import Request

__all__ = ["IMPLEMENTATION_MODULES", "diff_attention", "resolve_impl"]

# Each enters its implementations into the registry when it is imported.
IMPLEMENTATION_MODULES = (naive, sdpa, paired, flash2, fused)
_KNOWN = tuple(Impl)  # torch.compile of torch 2.11 cannot list an enum


def resolve_impl(impl: Impl | str) -> Impl:
    """The implementation of that name; ``auto`` stays, and looks at the tensors later.

    Raises:
        InputError: ``impl`` is not an implementation.
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
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Differential attention of every head (arXiv 2410.05258, equation 1).

    ``softmax(q1 k1^T / sqrt(d)) v - lam softmax(q2 k2^T / sqrt(d)) v``; the two streams of a head are neighbours.
    A query that sees no key gives 0.

    Keys that are held in pairs must be finite in those implementations that read the pairs as they are (``padded``,
    ``paired``, ``rows``): there an infinite ``k1`` makes what reads ``k2`` NaN as well, see `diffdeploy.ops.rows`.

    Args:
        q_BHSd: queries ``[B, 2h, S, d]``, head ``i`` stream ``s`` at ``2i + s``.
        k_BHTd: keys ``[B, 2 h_kv, T, d]`` in the same order; or both streams side by side, ``[k1 | k2]``,
            ``[B, h_kv, T, 2d]``; or ``[B, h_kv, T, d]`` when both streams read the same.
        v_BHTe: values ``[B, h_kv, T, e]``; ``e`` is ``2d`` in the paper, ``d`` in the second version.
        lam: scalar, or ``[B or 1, h, S, 1]``; rounded once to the dtype of ``q``.
        causal: query ``i`` of ``S`` sees keys up to ``T - S + i``.
        attn_mask: boolean (``True`` is seen) or additive, broadcastable to ``[B, 1 or h or 2h, S, T]``.
        sliding_window: of those, only the last ``sliding_window`` keys; needs ``causal``.
        gqa_layout: which key stream a query stream reads when ``h_kv < h``; see `DiffAttentionConfig`.
        scale: factor of the scores; by default ``d ** -0.5``.
        impl: which implementation; ``auto`` takes the fastest one measured.

    Returns:
        ``[B, h, S, e]`` in the dtype of ``q``.

    Raises:
        InputError: shapes or a mask that do not fit, or something that the implementation asked for cannot do.
        UnavailableError: the implementation asked for cannot run here.
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
    )
    resolved = resolve_impl(impl)
    chosen = cheapest(request) if resolved == Impl.AUTO else implementation(resolved)
    reason = chosen.why_not(request)
    if reason is not None:
        raise reason
    return chosen.run(request)
