"""Faults in passing on a cache or updating it in place: runtimes with one wrong step.

Shape suffixes: B batch, S new tokens, P past tokens, T = P + S.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats import CacheBuffers
from diffdeploy.runtime import Runtime
from diffdeploy.selftest.conditions import has_positions, rows_above
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of
from diffdeploy.selftest.stand_in import StandIn

__all__ = ["CACHE_FAULTS", "entered"]

CACHE_FAULTS: list[Fault] = []

Kind = TypeVar("Kind", bound=type[StandIn])
Inputs = dict[str, Any]

# Number of cached tokens that a wrong window leaves visible, fewer than most pasts in the sweep have.
_WINDOW = 8


def entered(table: list[Fault], family: str, name: str, breaks: str, *conditions: When) -> Callable[[Kind], Kind]:
    """Add a runtime with one wrong step to a table of faults."""

    def enter(stand_in: Kind) -> Kind:
        table.append(
            Fault(
                name=name,
                place="runtime",
                family=family,
                breaks=breaks,
                stand_in=stand_in,
                applies=all_of(*conditions),
            )
        )
        return stand_in

    return enter


def _faulty(name: str, breaks: str, *conditions: When) -> Callable[[Kind], Kind]:
    return entered(CACHE_FAULTS, "caches", name, breaks, *conditions)


def _counts_tokens(target: FaultTarget) -> bool:
    return target.spec.padding != "anywhere"


def _writes_in_place(target: FaultTarget) -> bool:
    return _counts_tokens(target) or target.spec.cache == "in-place"


def _several_layers(target: FaultTarget) -> bool:
    return target.decoder is not None and target.decoder.num_layers > 1


@_faulty("cache_position_off_by_one", "positions after a past are one too high", has_positions)
class PositionOffByOne(StandIn):
    """Positions after a past are one too high."""

    def given(self, inputs: Inputs, past_length: int) -> Inputs:
        values = self.spec.inputs["position_ids"].values
        if not past_length or values is None:
            return inputs
        return {**inputs, "position_ids": np.minimum(inputs["position_ids"] + 1, values.max)}


@_faulty("cache_counts_one_token_more", "an in-place call counts one token too many", _counts_tokens)
class CountsOneTokenMore(StandIn):
    """An in-place call counts one token too many, and reads a cell that was never written."""

    def given(self, inputs: Inputs, past_length: int) -> Inputs:
        mask_BT = inputs["attention_mask"]
        if not past_length or self.spec.caches.keys() <= inputs.keys():
            return inputs
        more = np.ones((len(mask_BT), 1), np.int64)
        return {**inputs, "attention_mask": np.concatenate((more, mask_BT), axis=1)}


@_faulty("cache_stale_slot", "the newest token of a later call is not stored in one layer")
class StaleSlot(StandIn):
    """The newest token of a later call is not stored in one layer, so the previous token is read instead."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        if past_length:
            for array in list(caches.values())[-2:]:
                for row, newest in enumerate(newest_B):
                    array[row, :, newest] = array[row, :, newest - 1]


@_faulty("cache_layers_swapped", "the caches of two layers are swapped", _several_layers)
class LayersSwapped(StandIn):
    """The caches of the first and the last layer are swapped after the prompt."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        if past_length:
            return
        arrays = list(caches.values())
        for one, other in zip(arrays[:2], arrays[-2:], strict=True):
            one[:], other[:] = other.copy(), one.copy()


@_faulty("cache_sides_shifted", "the values in the cache of one layer are one token late")
class SidesShifted(StandIn):
    """The values in the cache of one layer are one token late, while its keys are correct."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        if not past_length:
            values = list(caches.values())[1]
            values[:, :, 1:] = values[:, :, :-1].copy()


@_faulty("cache_window", "a token sees only the last 8 tokens of the cache")
class Window(StandIn):
    """A token sees only the last 8 tokens of the cache, though there is no window: older ones are masked or lost."""

    def given(self, inputs: Inputs, past_length: int) -> Inputs:
        if past_length <= _WINDOW or not self.spec.caches.keys() <= inputs.keys():
            return inputs
        mask_BT = inputs["attention_mask"].copy()
        mask_BT[:, : past_length - _WINDOW] = 0
        return {**inputs, "attention_mask": mask_BT}

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        for row, newest in enumerate(newest_B):
            for array in caches.values():
                array[row, :, : max(0, newest - _WINDOW)] = 0


@_faulty("cache_wraps_at_16", "the newest of more than 16 tokens overwrites the oldest")
class Wraps(StandIn):
    """The newest of more than 16 tokens overwrites the oldest, as in the ring buffer of a window."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        for row, newest in enumerate(newest_B):
            for array in caches.values() if newest >= 2 * _WINDOW else ():
                array[row, :, newest - 2 * _WINDOW] = array[row, :, newest]


@_faulty("cache_left_padding_counted", "rows are padded on the left, and tokens are counted from there", _counts_tokens)
class LeftPaddingCounted(StandIn):
    """Rows are padded on the left, and the operator takes as many tokens from there as the mask counts."""

    def given(self, inputs: Inputs, past_length: int) -> Inputs:
        mask_BT = inputs["attention_mask"]
        counted = (np.arange(mask_BT.shape[1]) < mask_BT.sum(1, keepdims=True)).astype(np.int64)
        return {**inputs, "attention_mask": counted}


@_faulty("cache_rows_share_a_buffer", "all rows read and write the cache of the first", rows_above(1))
class RowsShareABuffer(StandIn):
    """All rows read and write the cache of the first row."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        for array in caches.values():
            array[1:] = array[:1]


@_faulty("cache_memory_reused", "the cache of a call reuses the memory of an earlier cache of the same shape")
class MemoryReused(StandIn):
    """The cache of a call reuses the memory of an earlier cache of the same shape, which may still be in use."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._made: dict[tuple[str, tuple[int, ...]], Array] = {}

    def __call__(self, *unnamed: object, **inputs: Any) -> dict[str, Any]:
        outputs = super().__call__(*unnamed, **inputs)
        for present in self.spec.caches.values():
            buffer = self._made.setdefault((present, outputs[present].shape), outputs[present])
            buffer[:] = outputs[present]
            outputs[present] = buffer
        return outputs


@_faulty("cache_shared_between_sequences", "alternating batches are written into one buffer", _writes_in_place)
class SharedBetweenSequences(StandIn):
    """One buffer is created for each size, and used for every batch of sequences of that size."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._made: dict[tuple[int, int], CacheBuffers | None] = {}

    def buffers(self, batch_size: int, capacity: int, fill: float = 0.0) -> CacheBuffers | None:
        if (batch_size, capacity) not in self._made:
            self._made[batch_size, capacity] = super().buffers(batch_size, capacity, fill)
        return self._made[batch_size, capacity]


@_faulty("cache_written_beyond", "a cell after the newest token is written", _writes_in_place)
class WrittenBeyond(StandIn):
    """A cell after the newest token is written in place, which has no effect until a later call depends on it."""

    def spoil(self, caches: Mapping[str, Array], newest_B: Array, past_length: int) -> None:
        for array in caches.values():
            beyond = int(newest_B.max()) + 1
            if beyond < array.shape[2]:
                array[:, :, beyond] = array[:, :, beyond - 1]


@_faulty("cache_wraps_at_the_capacity", "tokens beyond the capacity replace the oldest instead of being refused")
class WrapsAtTheCapacity(StandIn):
    """Tokens beyond the capacity replace the oldest instead of being refused."""

    def __call__(self, *unnamed: object, **inputs: Any) -> dict[str, Any]:
        capacity = self.spec.axes["total_sequence_length"].max
        over = inputs["attention_mask"].shape[1] - capacity
        if over > 0:
            cut = {name: array[:, over:] for name, array in inputs.items() if name == "attention_mask"}
            past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
            new = ("input_ids", "position_ids") if over > past else ()
            cut |= {name: inputs[name][:, over - past :] for name in new if name in inputs}
            cut |= {name: inputs[name][:, :, min(over, past) :] for name in self.spec.caches}
            inputs = {**inputs, **cut}
        return super().__call__(*unnamed, **inputs)
