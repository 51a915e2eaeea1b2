"""Blocks with the wrong cache.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.modules import KeyValueCache
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps
from diffdeploy.selftest.conditions import cached, float32, has_rope, version_1


@faulty("cache_not_appended", "new tokens are zeros in the cache", Stage.CACHE, cached)
class CacheNotAppended(Steps):
    """New tokens are zeros in the cache."""

    def append(self, past: KeyValueCache, k_BHSd: Tensor, v_BHSe: Tensor) -> KeyValueCache:
        return super().append(past, k_BHSd * 0, v_BHSe * 0)


@faulty("past_comes_last", "new tokens stand before the past", Stage.CACHE, cached)
class PastComesLast(Steps):
    """New tokens stand before the past."""

    def append(self, past: KeyValueCache, k_BHSd: Tensor, v_BHSe: Tensor) -> KeyValueCache:
        return torch.cat((k_BHSd, past[0]), dim=2), torch.cat((v_BHSe, past[1]), dim=2)


@faulty("past_reversed", "the past in reverse order of its tokens", Stage.CACHE, cached)
class PastReversed(Steps):
    """The past in reverse order of its tokens."""

    def append(self, past: KeyValueCache, k_BHSd: Tensor, v_BHSe: Tensor) -> KeyValueCache:
        return super().append((past[0].flip(2), past[1].flip(2)), k_BHSd, v_BHSe)


@faulty("cached_before_rope", "the keys that are given back are not turned yet", Stage.CACHE, cached, has_rope)
class CachedBeforeRope(Steps):
    """The keys that are given back are not turned yet."""

    def cache(self, past: KeyValueCache | None, hidden_states: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> KeyValueCache:
        if past is None:
            return k_BHTd, v_BHTe
        keys = self.k_proj(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return torch.cat((past[0], keys), dim=2), v_BHTe


@faulty(
    "cached_streams_exchanged",
    "the cache that is given back has signal and noise keys exchanged",
    Stage.CACHE,
    cached,
    version_1,
)
class CachedStreamsExchanged(Steps):
    """The cache that is given back has signal and noise keys exchanged."""

    def cache(self, past: KeyValueCache | None, hidden_states: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> KeyValueCache:
        return k_BHTd.reshape(k_BHTd.shape[0], -1, 2, *k_BHTd.shape[2:]).flip(2).flatten(1, 2), v_BHTe


@faulty(
    "cached_halves_exchanged",
    "the cache that is given back has the wrong half of the values first",
    Stage.CACHE,
    cached,
)
class CachedHalvesExchanged(Steps):
    """The cache that is given back has the wrong half of the values first."""

    def cache(self, past: KeyValueCache | None, hidden_states: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> KeyValueCache:
        return k_BHTd, v_BHTe.roll(v_BHTe.shape[-1] // 2, dims=-1)


@faulty("cached_in_half_precision", "the values that are given back went through float16", Stage.CACHE, cached, float32)
class CachedInHalfPrecision(Steps):
    """The values that are given back went through float16."""

    def cache(self, past: KeyValueCache | None, hidden_states: Tensor, k_BHTd: Tensor, v_BHTe: Tensor) -> KeyValueCache:
        return k_BHTd, v_BHTe.half().to(v_BHTe.dtype)
