"""The gated MLPs of decoder layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdeploy.config import POLYNORM_EPS, MlpConfig

__all__ = ["GatedMlp", "PolyNorm"]


class PolyNorm(nn.Module):
    """``w0 n(z^3) + w1 n(z^2) + w2 n(z) + b`` with ``n(u) = u / sqrt(mean(u^2) + 1e-6)`` over the last axis.

    Source: Motif-Technologies, ``PolyNorm`` of Motif-2.6B, whose first weight belongs to the cube (arXiv 2411.03884).
    It is computed in at least float32, since the sixth power of numbers above 6.3 overflows float16.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Apply the function to ``[..., I]``; the result has the dtype of ``z``."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        wide, w = z.to(dtype), self.weight.to(dtype)
        powers = (wide * wide * wide, wide * wide, wide)
        total = sum(
            (w[i] * F.rms_norm(u, u.shape[-1:], eps=POLYNORM_EPS) for i, u in enumerate(powers)), self.bias.to(dtype)
        )
        return total.to(z.dtype)


class GatedMlp(nn.Module):
    """Gated MLP, ``W_down(act(W_gate x) * W_up x)``.

    Args:
        config: kind and sizes of the MLP.
        embed_dim: model width ``D``.
        device: device of the parameters, as for any module.
        dtype: dtype of the parameters, as for any module.
    """

    def __init__(
        self,
        config: MlpConfig,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        wide, bias = config.hidden_dim, config.bias
        self.gate_proj = nn.Linear(embed_dim, wide, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(embed_dim, wide, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(wide, embed_dim, bias=bias, device=device, dtype=dtype)
        self.act: nn.Module = PolyNorm(device, dtype) if config.kind == "polynorm" else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to ``[..., D]``; the result has the same shape."""
        output: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return output
