"""``nn.Module`` building blocks over `diffdeploy.ops`."""

from diffdeploy.modules.attention import AttentionBlock, DiffAttention, DiffAttentionV2, KeyValueCache, block_class
from diffdeploy.modules.decoder import DecoderLayer, DiffTransformer
from diffdeploy.modules.mlp import GatedMlp, PolyNorm
from diffdeploy.modules.rotary import RotaryEmbedding

# What an artifact can be made of.
AnyModule = AttentionBlock | DiffTransformer

__all__ = [
    "AnyModule",
    "AttentionBlock",
    "DecoderLayer",
    "DiffAttention",
    "DiffAttentionV2",
    "DiffTransformer",
    "GatedMlp",
    "KeyValueCache",
    "PolyNorm",
    "RotaryEmbedding",
    "block_class",
]
