"""``nn.Module`` building blocks over `diffdeploy.ops`."""

from diffdeploy.modules.attention import DiffAttention
from diffdeploy.modules.rotary import RotaryEmbedding

__all__ = ["DiffAttention", "RotaryEmbedding"]
