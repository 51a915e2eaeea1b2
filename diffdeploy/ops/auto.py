"""What ``auto`` takes: the fastest implementation for the device, dtype and size at hand.

Every rule comes from `python scripts/measure_ops.py` (``--device cuda``); `docs/operator-speed.md` has the figures.
"""

import torch
from torch import Tensor

from diffdeploy.ops.impl import Impl

__all__ = ["fastest"]

# Of one stream, in elements: as long as they stay in the processor's caches.
_CACHED_SCORES_FP16 = 2**21
_SHORTEST_FOR_PRODUCTS = 32


def fastest(q_BHSd: Tensor, k_BHTd: Tensor) -> Impl:
    """The fastest implementation for these tensors.

    Args:
        q_BHSd: queries ``[B, 2h, S, d]``.
        k_BHTd: keys ``[B, 2 h_kv or h_kv, T, d]``.
    """
    if q_BHSd.device.type == "cuda":
        return Impl.STACKED_WIDE
    if q_BHSd.device.type != "cpu" or torch.compiler.is_compiling():
        return Impl.PADDED  # sizes may be symbols, and a rule on them would become a guard
    length = q_BHSd.shape[2]
    if q_BHSd.dtype == torch.float16:
        scores = q_BHSd.shape[0] * (q_BHSd.shape[1] // 2) * length * k_BHTd.shape[2]
        return Impl.STACKED_WIDE if scores < _CACHED_SCORES_FP16 else Impl.PADDED
    if q_BHSd.requires_grad or length < _SHORTEST_FOR_PRODUCTS:
        return Impl.PADDED  # whose backward keeps no probabilities
    return Impl.CHUNKED
