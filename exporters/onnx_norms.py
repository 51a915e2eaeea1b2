"""RMS norms whose epsilon torch's ONNX exporter would drop.

Below opset 23, a norm is decomposed into single operators, and the optimiser that follows the exporter removes an
addition of anything up to 1e-8 as if it were 0: rows of zeros then result in NaN (torch 2.13).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffdeploy.modules import AnyModule

__all__ = ["small_epsilons_kept"]

# The first opset with an operator for the norm, which stores epsilon as an attribute.
_HAS_OPERATOR = 23
# Larger epsilons are kept; as measured, 1e-6 is kept and 1e-8 is not.
_SMALL = 1e-7


class _ScaledNorm(nn.Module):
    """An equivalent norm that multiplies its input by ``c``, and epsilon by ``c ** 2``, so that epsilon is near 1.

    ``c`` is a power of 2, so that no rounding changes.
    """

    def __init__(self, norm: nn.RMSNorm, eps: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.factor = 2.0 ** round(-math.log2(eps) / 2)
        self.eps = eps * self.factor**2

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, in at least fp32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * self.factor
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (unit if self.weight is None else unit * self.weight.to(unit.dtype)).to(x.dtype)


@contextmanager
def small_epsilons_kept(block: AnyModule, opset: int) -> Iterator[None]:
    """Within the ``with`` statement, replace the block's norms with norms whose epsilons the exporter keeps."""
    replaced: list[tuple[nn.Module, str, nn.RMSNorm]] = []
    if opset < _HAS_OPERATOR:
        for owner in list(block.modules()):
            for name, norm in list(owner.named_children()):
                if isinstance(norm, nn.RMSNorm) and norm.eps is not None and norm.eps < _SMALL:
                    replaced.append((owner, name, norm))
                    setattr(owner, name, _ScaledNorm(norm, norm.eps))
    try:
        yield
    finally:
        for owner, name, norm in replaced:
            setattr(owner, name, norm)
