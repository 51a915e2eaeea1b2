"""A DIFF Transformer language model: the setting in which the block was published, and the one of the sample."""

import torch.nn.functional as F
from torch import Tensor, nn

from diffdeploy.config import DecoderConfig
from diffdeploy.modules.attention import DiffAttention
from diffdeploy.ops import Impl

__all__ = ["DiffTransformer"]


class _SwiGlu(nn.Module):
    """``W_down(silu(W_gate x) * W_up x)`` (arXiv 2002.05202, section 2)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class _DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each with a residual (arXiv 2410.05258, section 2.2)."""

    def __init__(self, config: DecoderConfig, layer: int, impl: Impl | str, max_positions: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.self_attn = DiffAttention(config.attention(layer), impl=impl, max_positions=max_positions)
        self.ffn_norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.ffn = _SwiGlu(config.embed_dim, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.attention_norm(x))
        output: Tensor = x + self.ffn(self.ffn_norm(x))
        return output


class DiffTransformer(nn.Module):
    """Decoder-only language model of differential-attention layers (arXiv 2410.05258, section 2).

    Args:
        config: sizes.
        impl: how the attentions are computed.
        max_positions: longest sequence.
    """

    def __init__(self, config: DecoderConfig, *, impl: Impl | str = Impl.AUTO, max_positions: int = 4096) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(
            _DecoderLayer(config, layer, impl, max_positions) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.embed_dim, config.norm_eps)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Predict the next token.

        Args:
            input_ids: ``[B, S]``, int64.

        Returns:
            Logits ``[B, S, vocab_size]``.

        Raises:
            InputError: ``S`` exceeds ``max_positions``.
        """
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
