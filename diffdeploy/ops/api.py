"""One entry point and one resolver for all implementations of the operator."""

from collections.abc import Callable
from enum import StrEnum

from torch import Tensor

from diffdeploy.errors import InputError
from diffdeploy.ops.naive import naive
from diffdeploy.ops.sdpa import padded, two_call

__all__ = ["Impl", "diff_attention", "resolve_impl"]


class Impl(StrEnum):
    """How the two attentions of a differential head are computed."""

    AUTO = "auto"
    NAIVE = "naive"
    TWO_CALL = "two_call"
    PADDED = "padded"


_IMPLEMENTATIONS: dict[Impl, Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]] = {
    Impl.NAIVE: naive,
    Impl.TWO_CALL: two_call,
    Impl.PADDED: padded,
}


def resolve_impl(impl: Impl | str, *, target: str = "eager") -> Impl:
    """Turn ``auto`` into the fastest implementation for ``target``; anything else is kept as asked for.

    Args:
        impl: what the user asked for.
        target: ``eager``, or the deployment format that the block is lowered to.

    Raises:
        InputError: ``impl`` is not an implementation.
    """
    if impl not in list(Impl):
        raise InputError(f"attention implementation {str(impl)!r} is not known; accepted: {', '.join(Impl)}")
    if impl != Impl.AUTO:
        return Impl(impl)
    return Impl.TWO_CALL if target == "onnx" else Impl.PADDED


def diff_attention(
    q_BHSd: Tensor,
    k_BHTd: Tensor,
    v_BHTe: Tensor,
    lam: Tensor,
    *,
    causal: bool,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Differential attention of every head (arXiv 2410.05258, equation 1).

    ``softmax(q1 k1^T / sqrt(d)) v - lam softmax(q2 k2^T / sqrt(d)) v``; the two streams of a head are neighbours.

    Args:
        q_BHSd: queries ``[B, 2h, S, d]``, head ``i`` stream ``s`` at ``2i + s``.
        k_BHTd: keys ``[B, 2h_kv, T, d]`` in the same order; query head ``i`` reads key head ``i // (h / h_kv)``.
        v_BHTe: values ``[B, h_kv, T, 2d]``.
        lam: scalar tensor; rounded once to the dtype of ``q``.
        causal: query ``i`` of ``S`` sees keys up to ``T - S + i``.
        impl: which implementation; ``auto`` takes the fastest one measured.

    Returns:
        ``[B, h, S, 2d]`` in the dtype of ``q``.

    Raises:
        InputError: ``impl`` is not an implementation.
    """
    run = _IMPLEMENTATIONS[resolve_impl(impl)]
    return run(q_BHSd, k_BHTd, v_BHTe, lam.to(q_BHSd.dtype), causal)
