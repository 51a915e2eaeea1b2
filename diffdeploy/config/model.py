"""Sizes of a whole decoder, from which each layer's block config follows."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from diffdeploy.config.block import DiffAttentionConfig, lambda_init_at
from diffdeploy.config.rope import RopeConfig

__all__ = ["DecoderConfig"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder-only DIFF Transformer.

    Attributes:
        vocab_size: number of tokens.
        embed_dim: model width ``D``.
        num_layers: decoder layers.
        num_heads: differential heads ``h`` per layer, each ``D / h`` wide at its output.
        num_kv_heads: differential key/value heads ``h_kv``.
        ffn_dim: hidden width of the SwiGLU; the paper's is ``8/3 D``.
        rope: rotary embedding of all layers.
        norm_eps: epsilon of every RMS norm.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    rope: RopeConfig
    norm_eps: float = 1e-5

    def attention(self, layer: int) -> DiffAttentionConfig:
        """Config of the attention block in the 0-based ``layer``."""
        return DiffAttentionConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            # A differential head is as wide as two heads of the softmax model of equal size.
            head_dim=self.embed_dim // self.num_heads // 2,
            lambda_init=lambda_init_at(layer),
            output_scale=1 - lambda_init_at(layer),
            rope=self.rope,
            norm_eps=self.norm_eps,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**fields, "rope": RopeConfig(**fields["rope"])})
