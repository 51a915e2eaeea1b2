"""The block that differential attention is compared with: plain softmax attention of the same parameter count.

It has ``2h`` heads of width ``d`` and the same four projections (arXiv 2410.05258, section 2.1), but no biases,
norms or lambda.

Shape suffixes: B batch, H heads, S query length, P past length, T = P + S key length, D model width, d head width.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdeploy.config import AnyConfig, DiffAttentionV2Config
from diffdeploy.modules import KeyValueCache
from diffdeploy.modules.rotary import RotaryEmbedding
from diffdeploy.ops.masks import visibility

__all__ = ["SoftmaxAttention", "as_second_version"]

_PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")


class SoftmaxAttention(nn.Module):
    """Multi-head attention in one call of ``scaled_dot_product_attention``, with the interface of an `AttentionBlock`.

    Args:
        config: config of the differential block of equal size.
        weights: its canonical weights; the projections are taken from them.
        max_positions: number of positions that can be embedded, if the config has rotary embedding.
        dtype: dtype of the block.
    """

    def __init__(
        self, config: AnyConfig, weights: Mapping[str, Tensor], *, max_positions: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.q_rows, self.k_rows, self.v_rows, self.out_rows = (
            nn.Parameter(weights[name].to(dtype), requires_grad=False) for name in _PROJECTIONS
        )
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, max_positions, dtype=dtype) if config.rope else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
    ) -> Any:
        """Attend over the sequence of each batch row; see `AttentionBlock.forward` for the arguments."""
        q_BHSd, k_BHTd, v_BHTd = (
            F.linear(hidden_states, rows).reshape(*hidden_states.shape[:2], -1, self.config.head_dim).transpose(1, 2)
            for rows in (self.q_rows, self.k_rows, self.v_rows)
        )
        past_length = 0 if past_key_values is None else past_key_values[0].shape[2]
        if self.rotary is not None:
            q_BHSd = self.rotary(q_BHSd, position_ids, offset=past_length)
            k_BHTd = self.rotary(k_BHTd, position_ids, offset=past_length)
        if past_key_values is not None:
            k_BHTd = torch.cat((past_key_values[0], k_BHTd), dim=2)
            v_BHTd = torch.cat((past_key_values[1], v_BHTd), dim=2)
        seen = visibility(
            q_BHSd,
            k_BHTd,
            causal=self.config.causal,
            attn_mask=None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None],
            sliding_window=self.config.sliding_window,
        )
        heads_BHSd = F.scaled_dot_product_attention(
            q_BHSd,
            k_BHTd,
            v_BHTd,
            attn_mask=seen.mask,
            is_causal=seen.is_causal,
            enable_gqa=q_BHSd.shape[1] != k_BHTd.shape[1],
        )
        output = F.linear(seen.clear_dead(heads_BHSd).transpose(1, 2).flatten(2), self.out_rows)
        return output if past_key_values is None else (output, (k_BHTd, v_BHTd))


def as_second_version(
    config: AnyConfig, weights: Mapping[str, Tensor]
) -> tuple[DiffAttentionV2Config, dict[str, Tensor]]:
    """Express the softmax block as a block of the second version, so that its oracle computes the exact result.

    Both streams of a head get the same queries, and lambda is ``sigmoid(0) = 1/2``: the difference is half of the
    attention, and doubled weights of the output projection compensate for that. Every step but the attention is exact.

    Args:
        config: config of the differential block of equal size.
        weights: its canonical weights.

    Returns:
        Config, and weights in the given dtypes.
    """
    second = DiffAttentionV2Config(
        embed_dim=config.embed_dim,
        num_heads=2 * config.num_heads,
        num_kv_heads=2 * config.num_kv_heads,
        head_dim=config.head_dim,
        causal=config.causal,
        rope=config.rope,
        sliding_window=config.sliding_window,
    )
    q_rows, out_columns = weights["q_proj.weight"], weights["out_proj.weight"]
    twice = q_rows.reshape(-1, config.head_dim, config.embed_dim).repeat_interleave(2, dim=0).flatten(0, 1)
    return second, {
        "q_proj.weight": twice,
        "k_proj.weight": weights["k_proj.weight"],
        "v_proj.weight": weights["v_proj.weight"],
        "out_proj.weight": 2 * out_columns,
        "lambda_proj.weight": torch.zeros(second.num_heads, config.embed_dim, dtype=q_rows.dtype),
    }
