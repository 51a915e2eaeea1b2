"""The block's forward pass in steps that a fault can replace one of; without a fault it is the block.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.modules import AttentionBlock, KeyValueCache
from diffdeploy.modules.attention import Rotation
from diffdeploy.ops.heads import stream_heads
from diffdeploy.ops.masks import Visibility, visibility

__all__ = ["Steps"]


class Steps(AttentionBlock):
    """A base to put in front of a block's class; each fault overrides one step."""

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotate: Rotation,
        past_key_values: KeyValueCache | None = None,
        *,
        causal: bool | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        config = self.config
        q_BHSd = self.turn_queries(self._normalise_queries(_split(self.q_proj(hidden_states), config.head_dim)), rotate)
        k_BHSd = self.turn_keys(self._normalise_keys(_split(self.k_proj(hidden_states), config.head_dim)), rotate)
        v_BHSe = self.values(_split(self.v_proj(hidden_states), config.value_dim))
        cache = (k_BHSd, v_BHSe)
        if past_key_values is not None:
            cache = self.append(past_key_values, k_BHSd, v_BHSe)
        mask = None if attention_mask is None else self.key_mask(attention_mask)[:, None, None]
        seen = self.seen(q_BHSd, cache[0], mask)
        signal, noise = (self.stream(stream, q_BHSd, *cache, seen) for stream in (0, 1))
        lam = self._lambda(hidden_states).to(signal.dtype)
        joined = self.join(self._normalise(self.difference(signal, noise, lam)))
        return self.project(joined), self.cache(past_key_values, hidden_states, *cache)

    def turn_queries(self, q_BHSd: Tensor, rotate: Rotation) -> Tensor:
        """Rotary embedding of the queries."""
        return rotate(q_BHSd)

    def turn_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        """Rotary embedding of the keys."""
        return rotate(k_BHSd)

    def values(self, v_BHSe: Tensor) -> Tensor:
        """Values of the new tokens."""
        return v_BHSe

    def append(self, past: KeyValueCache, k_BHSd: Tensor, v_BHSe: Tensor) -> KeyValueCache:
        """Past and present, which attention reads."""
        return torch.cat((past[0], k_BHSd), dim=2), torch.cat((past[1], v_BHSe), dim=2)

    def cache(self, past: KeyValueCache | None, hidden_states: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> KeyValueCache:
        """What is given back for the next call."""
        return k_BHTd, v_BHTe

    def key_mask(self, attention_mask: Tensor) -> Tensor:
        """``[B, T]``, ``True`` for tokens."""
        return attention_mask.to(torch.bool)

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        """What both streams may see."""
        config = self.config
        return visibility(q_BHSd, k_BHTd, causal=config.causal, attn_mask=mask, sliding_window=config.sliding_window)

    def seen_by(self, stream: int, seen: Visibility) -> Visibility:
        """What one stream may see."""
        return seen

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one stream."""
        config = self.config
        return q_BHSd[:, stream::2], *stream_heads(k_BHTd, v_BHTe, stream, config.num_heads, config.gqa_layout)

    def attend(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        """One softmax attention."""
        output = F.scaled_dot_product_attention(
            q_BHSd,
            k_BHTd,
            v_BHTe,
            attn_mask=seen.mask,
            is_causal=seen.is_causal,
            enable_gqa=q_BHSd.shape[1] != k_BHTd.shape[1],
        )
        return seen.clear_dead(output)

    def stream(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        """Attention of one stream."""
        return self.attend(*self.heads_of(stream, q_BHSd, k_BHTd, v_BHTe), self.seen_by(stream, seen))

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        """The differential heads."""
        return signal - lam * noise

    def join(self, heads_BHSe: Tensor) -> Tensor:
        """``[B, S, H e]``."""
        return heads_BHSe.transpose(1, 2).flatten(2)

    def project(self, joined: Tensor) -> Tensor:
        """The output projection."""
        output: Tensor = self.out_proj(joined)
        return output


def _split(x_BSD: Tensor, width: int) -> Tensor:
    return x_BSD.reshape(*x_BSD.shape[:2], -1, width).transpose(1, 2)
