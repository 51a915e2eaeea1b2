"""``nn.Module`` building blocks over `diffdeploy.ops`."""

from diffdeploy.modules.attention import AttentionBlock, DiffAttention, DiffAttentionV2, KeyValueCache, block_class
from diffdeploy.modules.decoder import DecoderLayer, DiffTransformer
from diffdeploy.modules.mlp import GatedMlp, PolyNorm
from diffdeploy.modules.rotary import RotaryEmbedding

# Modules that an artifact can be made from.
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
