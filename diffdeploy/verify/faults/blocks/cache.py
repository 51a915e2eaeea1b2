"""Blocks with the wrong cache.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.modules import KeyValueCache
from diffdeploy.verify.faults.blocks.entry import faulty
from diffdeploy.verify.faults.blocks.steps import Steps
from diffdeploy.verify.faults.conditions import cached, float32, has_rope, several_kv_heads, version_1
from diffdeploy.verify.stages import Stage


@faulty(Stage.CACHE, cached)
class CacheNotAppended(Steps):
    """New tokens are zeros in the cache."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append(past, (new[0] * 0, new[1] * 0))


@faulty(Stage.CACHE, cached)
class PastComesLast(Steps):
    """New tokens stand before the past."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append(new, past)


@faulty(Stage.CACHE, cached)
class PastReversed(Steps):
    """The past in reverse order of its tokens."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append((past[0].flip(2), past[1].flip(2)), new)


@faulty(Stage.CACHE, cached, has_rope)
class CachedBeforeRope(Steps):
    """The keys that are given back are not turned yet."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        keys = self.k_proj(hidden_states).unflatten(-1, (-1, self.config.key_cache_dim)).transpose(1, 2)
        return torch.cat((past[0], keys), dim=2), cache[1]


@faulty(Stage.CACHE, cached, version_1)
class CachedStreamsExchanged(Steps):
    """The cache that is given back has signal and noise keys exchanged."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0].roll(self.config.head_dim, dims=-1), cache[1]


@faulty(Stage.CACHE, cached, version_1, several_kv_heads)
class CachedPairsOfHeads(Steps):
    """The cache that is given back holds the same stream of two heads side by side."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        keys = cache[0].unflatten(-1, (2, -1))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        pairs = keys.permute(0, 3, 1, 2, 4).flatten(1, 2).unflatten(1, (-1, 2))
        return pairs.transpose(2, 3).flatten(3), cache[1]


@faulty(Stage.CACHE, cached)
class CachedHalvesExchanged(Steps):
    """The cache that is given back has the wrong half of the values first."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0], cache[1].roll(cache[1].shape[-1] // 2, dims=-1)


@faulty(Stage.CACHE, cached, float32)
class CachedInHalfPrecision(Steps):
    """The values that are given back went through float16."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0], cache[1].half().to(cache[1].dtype)
