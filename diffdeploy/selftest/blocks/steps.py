"""The block's attention and cache in finer steps, one of which a fault replaces; the others do what the block does.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdeploy.modules import AttentionBlock, KeyValueCache
from diffdeploy.modules.attention import Rotation
from diffdeploy.ops import Impl
from diffdeploy.ops.heads import equal_widths, stream_heads
from diffdeploy.ops.masks import Visibility, visibility
from diffdeploy.ops.registry import implementation

__all__ = ["Steps", "to_half_precision"]

# 2 ** 13 + 1: keeps 11 of the 24 bits of float32.
_SPLIT = 8193.0


class Steps(AttentionBlock):
    """First base class of a faulty block, before the block's class; a fault overrides one step of either class.

    The graph has as many attentions as the block's graph, so that a fault is detected by its results, not by the number
    of attentions.
    """

    def compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotate: Rotation,
        past_key_values: KeyValueCache | None = None,
        *,
        causal: bool | None = None,
        total_length: int | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        output, cache = super().compute(
            hidden_states, attention_mask, rotate, past_key_values, causal=causal, total_length=total_length
        )
        return output, cache if past_key_values is None else self.handed_on(past_key_values, hidden_states, cache)

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        """Cache that is returned for the next call."""
        return cache

    def attend(
        self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        seen = self.seen(q_BHSd, k_BHTd, mask)
        signal, noise = self.streams(q_BHSd, k_BHTd, v_BHTe, seen)
        return self.difference(signal, noise, lam.to(signal.dtype))

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        """Combined mask of both streams."""
        config = self.config
        return visibility(q_BHSd, k_BHTd, causal=config.causal, attn_mask=mask, sliding_window=config.sliding_window)

    def seen_by(self, stream: int, seen: Visibility) -> Visibility:
        """Mask of one stream."""
        return seen

    def heads_of(self, stream: int, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one stream: ``h`` query heads; the number of key/value heads divides ``h``."""
        config = self.config
        k_BHTd, v_BHTe = stream_heads(
            k_BHTd,
            v_BHTe,
            stream,
            width=config.head_dim,
            num_heads=config.num_heads,
            gqa_layout=config.gqa_layout,
        )
        return q_BHSd[:, stream::2], k_BHTd, v_BHTe

    def streams(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
        """Attentions of both streams, in two calls, or in one with twice as many heads if the block makes one call."""
        parts = [self.heads_of(stream, q_BHSd, k_BHTd, v_BHTe) for stream in (0, 1)]
        masks = [self.seen_by(stream, seen) for stream in (0, 1)]
        impl = Impl(self.impl)
        if impl == Impl.AUTO or implementation(impl).num_attentions != 1:
            signal, noise = (self.softmax_attention(*part, mask) for part, mask in zip(parts, masks, strict=True))
            return signal, noise
        whole = [[side.repeat_interleave(part[0].shape[1] // side.shape[1], dim=1) for side in part] for part in parts]
        q, k, v = (torch.cat(sides, dim=1) for sides in zip(*whole, strict=True))
        signal, noise = self.softmax_attention(q, k, v, _by_stream(masks, q.shape[1] // 2)).chunk(2, dim=1)
        return signal, noise

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        """Compute one softmax attention, with equal widths if the block's kernels require them."""
        sides = (q_BHSd, k_BHTd, v_BHTe)
        output = F.scaled_dot_product_attention(
            *(sides if self.impl == Impl.TWO_CALL else equal_widths(*sides)),
            attn_mask=seen.mask,
            is_causal=seen.is_causal,
            scale=self.config.scale,
            enable_gqa=q_BHSd.shape[1] != k_BHTd.shape[1],
        )
        return seen.clear_dead(output[..., : v_BHTe.shape[-1]])

    def difference(self, signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
        """Compute the differential heads."""
        return signal - lam * noise


def _by_stream(masks: list[Visibility], num_heads: int) -> Visibility:
    """Concatenate the masks of both streams; a mask in a graph is the same for all heads."""
    first, second = masks
    if first is second or first.mask is None or second.mask is None:
        return first

    def together(one: Tensor, other: Tensor) -> Tensor:
        sides = (side.reshape(*(1,) * (4 - side.ndim), *side.shape) for side in (one, other))
        batch = max(one.shape[0] if one.ndim == 4 else 1, other.shape[0] if other.ndim == 4 else 1)
        return torch.cat([side.expand(batch, num_heads, -1, -1) for side in sides], dim=1)

    dead = None if first.dead is None or second.dead is None else together(first.dead, second.dead)
    return Visibility(together(first.mask, second.mask), dead=dead)


def to_half_precision(side: Tensor) -> Tensor:
    """Round float32 to the 11 bits of float16, but keep the range of float32.

    This is done by arithmetic (Dekker's splitting), since inductor removes pairs of casts that cancel.
    """
    spread = side * _SPLIT
    return spread - (spread - side)
