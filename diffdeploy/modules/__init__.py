"""``nn.Module`` building blocks over `diffdeploy.ops`."""

from diffdeploy.modules.attention import AttentionBlock, DiffAttention, DiffAttentionV2, KeyValueCache, block_class
from diffdeploy.modules.rotary import RotaryEmbedding

__all__ = ["AttentionBlock", "DiffAttention", "DiffAttentionV2", "KeyValueCache", "RotaryEmbedding", "block_class"]
