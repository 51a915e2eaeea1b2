"""Blocks with a wrong cache.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import torch
from torch import Tensor

from diffdeploy.graphs import Stage
from diffdeploy.modules import KeyValueCache
from diffdeploy.selftest.blocks.entry import faulty
from diffdeploy.selftest.blocks.steps import Steps, to_half_precision
from diffdeploy.selftest.conditions import cached, float32, has_rope, several_kv_heads, version_1


@faulty("cache_not_appended", "new tokens are zeros in the cache", Stage.CACHE, cached)
class CacheNotAppended(Steps):
    """New tokens are zeros in the cache."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append(past, (new[0] * 0, new[1] * 0))


@faulty("past_comes_last", "new tokens precede the past", Stage.CACHE, cached)
class PastComesLast(Steps):
    """New tokens precede the past."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append(new, past)


@faulty("past_reversed", "the tokens of the past are in reverse order", Stage.CACHE, cached)
class PastReversed(Steps):
    """The tokens of the past are in reverse order."""

    def append(self, past: KeyValueCache, new: KeyValueCache) -> KeyValueCache:
        return super().append((past[0].flip(2), past[1].flip(2)), new)


@faulty("cached_before_rope", "the returned keys are not rotated yet", Stage.CACHE, cached, has_rope)
class CachedBeforeRope(Steps):
    """The returned keys are not rotated yet."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        keys = self.k_proj(hidden_states).unflatten(-1, (-1, self.config.key_cache_dim)).transpose(1, 2)
        return torch.cat((past[0], keys), dim=2), cache[1]


@faulty(
    "cached_streams_exchanged",
    "signal and noise keys are swapped in the returned cache",
    Stage.CACHE,
    cached,
    version_1,
)
class CachedStreamsExchanged(Steps):
    """Signal and noise keys are swapped in the returned cache."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0].roll(self.config.head_dim, dims=-1), cache[1]


@faulty(
    "cached_pairs_of_heads",
    "the returned cache pairs the same stream of two heads",
    Stage.CACHE,
    cached,
    version_1,
    several_kv_heads,
)
class CachedPairsOfHeads(Steps):
    """The returned cache pairs the same stream of two heads."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        keys = cache[0].unflatten(-1, (2, -1))  # type: ignore[no-untyped-call]  # torch does not annotate it
        pairs = keys.permute(0, 3, 1, 2, 4).flatten(1, 2).unflatten(1, (-1, 2))
        return pairs.transpose(2, 3).flatten(3), cache[1]


@faulty(
    "cached_halves_exchanged",
    "the halves of the values are swapped in the returned cache",
    Stage.CACHE,
    cached,
)
class CachedHalvesExchanged(Steps):
    """The halves of the values are swapped in the returned cache."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0], cache[1].roll(cache[1].shape[-1] // 2, dims=-1)


@faulty("cached_in_half_precision", "the returned values were rounded to float16", Stage.CACHE, cached, float32)
class CachedInHalfPrecision(Steps):
    """The returned values were rounded to float16."""

    def handed_on(self, past: KeyValueCache, hidden_states: Tensor, cache: KeyValueCache) -> KeyValueCache:
        return cache[0], to_half_precision(cache[1])
