"""Blocks with a wrong rotary embedding or a wrong mask.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

from typing import cast

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.modules.attention import Rotation
from diffdeploy.ops.masks import Visibility, visibility
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import (
    cached,
    causal,
    causal_without_window,
    has_rope,
    longer_than_64,
    masked,
    version_1,
    window_above_64,
    without_window,
)


@faulty("keys_not_turned", "no rotary embedding on the keys", Stage.ROPE, has_rope)
class KeysNotTurned(Steps):
    """The keys have no rotary embedding."""

    def rotate_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        return k_BHSd


@faulty("queries_not_turned", "no rotary embedding on the queries", Stage.ROPE, has_rope)
class QueriesNotTurned(Steps):
    """The queries have no rotary embedding."""

    def rotate_queries(self, q_BHSd: Tensor, rotate: Rotation) -> Tensor:
        return q_BHSd


@faulty("keys_turned_twice", "the keys are rotated twice", Stage.ROPE, has_rope)
class KeysTurnedTwice(Steps):
    """The keys are rotated twice."""

    def rotate_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        return rotate(rotate(k_BHSd))


@faulty("noise_not_turned", "rotary embedding of the signal stream only", Stage.ROPE, has_rope, version_1)
class NoiseNotTurned(Steps):
    """Only the signal stream has a rotary embedding."""

    def rotate_queries(self, q_BHSd: Tensor, rotate: Rotation) -> Tensor:
        return _signal_only(rotate(q_BHSd), q_BHSd)

    def rotate_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        return _signal_only(rotate(k_BHSd), k_BHSd)


def _signal_only(turned: Tensor, plain: Tensor) -> Tensor:
    return torch.stack((turned[:, ::2], plain[:, 1::2]), dim=2).flatten(1, 2)


@faulty(
    "positions_ignored", "rotary positions count from 0, whatever ``position_ids`` says", Stage.ROPE, has_rope, masked
)
class PositionsIgnored(Steps):
    """Rotary positions count from 0, whatever ``position_ids`` says."""

    def rotate_queries(self, q_BHSd: Tensor, rotate: Rotation) -> Tensor:
        assert self.rotary is not None
        return cast("Tensor", self.rotary(q_BHSd))

    def rotate_keys(self, k_BHSd: Tensor, rotate: Rotation) -> Tensor:
        assert self.rotary is not None
        return cast("Tensor", self.rotary(k_BHSd))


@faulty("sees_one_future_key", "the causal mask is off by one, towards the future", Stage.SIGNAL, causal_without_window)
class SeesOneFutureKey(Steps):
    """The causal mask is off by one, towards the future."""

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        return _masked(self, q_BHSd, k_BHTd, mask, 1)


@faulty("does_not_see_itself", "the causal mask is off by one, towards the past", Stage.SIGNAL, causal_without_window)
class DoesNotSeeItself(Steps):
    """The causal mask is off by one, towards the past."""

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        return _masked(self, q_BHSd, k_BHTd, mask, -1)


def _masked(block: Steps, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None, more: int) -> Visibility:
    """Causal mask that shows ``more`` additional keys."""
    queries = torch.arange(q_BHSd.shape[2])[:, None] + (k_BHTd.shape[2] - q_BHSd.shape[2])
    band = (torch.arange(k_BHTd.shape[2]) <= queries + more)[None, None]
    return visibility(
        q_BHSd, k_BHTd, causal=False, attn_mask=band if mask is None else mask & band, sliding_window=None
    )


@faulty(
    "causal_top_left",
    "query ``i`` sees keys up to ``i``, whatever the length of the past",
    Stage.SIGNAL,
    causal_without_window,
    cached,
)
class CausalTopLeft(Steps):
    """Query ``i`` sees keys up to ``i``, whatever the length of the past."""

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        band = torch.ones(q_BHSd.shape[2], k_BHTd.shape[2], dtype=torch.bool).tril()[None, None]
        return visibility(
            q_BHSd, k_BHTd, causal=False, attn_mask=band if mask is None else mask & band, sliding_window=None
        )


@faulty("mask_ignored", "padding is seen", Stage.SIGNAL, masked)
class MaskIgnored(Steps):
    """Padding is seen."""

    def key_mask(self, attention_mask: Tensor) -> Tensor:
        return attention_mask >= 0


@faulty("mask_inverted", "tokens are hidden and padding is seen", Stage.SIGNAL, masked)
class MaskInverted(Steps):
    """Tokens are hidden and padding is seen."""

    def key_mask(self, attention_mask: Tensor) -> Tensor:
        return attention_mask == 0


@faulty("mask_shifted", "the padding mask is off by one", Stage.SIGNAL, masked)
class MaskShifted(Steps):
    """The padding mask is off by one."""

    def key_mask(self, attention_mask: Tensor) -> Tensor:
        return super().key_mask(attention_mask.roll(1, dims=1))


@faulty("mask_ignored_by_noise", "padding is hidden from the signal stream only", Stage.NOISE, masked, without_window)
class MaskIgnoredByNoise(Steps):
    """Padding is hidden from the signal stream only."""

    stream_without_mask = 1

    def seen_by(self, stream: int, seen: Visibility) -> Visibility:
        if stream != self.stream_without_mask or seen.mask is None:
            return seen
        length, key_length = seen.mask.shape[-2:]
        queries = torch.arange(length)[:, None] + (key_length - length)
        newest = queries if self.config.causal else queries + key_length
        return Visibility((torch.arange(key_length) <= newest)[None, None], False, seen.dead)


@faulty("mask_ignored_by_signal", "padding is hidden from the noise stream only", Stage.SIGNAL, masked, without_window)
class MaskIgnoredBySignal(MaskIgnoredByNoise):
    """Padding is hidden from the noise stream only."""

    stream_without_mask = 0


@faulty(
    "hidden_rows_are_averages",
    "a fully masked query returns the mean of the values, as kernels do by default",
    Stage.SIGNAL,
    masked,
)
class HiddenRowsAreAverages(Steps):
    """A fully masked query returns the mean of the values, as kernels do by default."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        return super().softmax_attention(q_BHSd, k_BHTd, v_BHTe, Visibility(seen.mask, seen.is_causal))


@faulty("hidden_rows_are_nan", "a fully masked query returns NaN, like a softmax of nothing", Stage.SIGNAL, masked)
class HiddenRowsAreNan(Steps):
    """A fully masked query returns NaN, like a softmax of nothing."""

    def softmax_attention(self, q_BHSd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, seen: Visibility) -> Tensor:
        output = super().softmax_attention(q_BHSd, k_BHTd, v_BHTe, Visibility(seen.mask, seen.is_causal))
        return output if seen.dead is None else output.masked_fill(seen.dead, float("nan"))


@faulty(
    "window_of64",
    "queries see only the last 64 keys, which has no effect on shorter sequences",
    Stage.SIGNAL,
    causal,
    window_above_64,
    longer_than_64,
)
class WindowOf64(Steps):
    """Queries see only the last 64 keys, which has no effect on shorter sequences."""

    def seen(self, q_BHSd: Tensor, k_BHTd: Tensor, mask: Tensor | None) -> Visibility:
        return visibility(q_BHSd, k_BHTd, causal=True, attn_mask=mask, sliding_window=64)
