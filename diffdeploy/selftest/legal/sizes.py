"""Faults that only some batches, lengths and pasts reveal."""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.conditions import cached, longer_than, masked, rows_above
from diffdeploy.selftest.legal.wrapping import (
    Arrays,
    length_of,
    num_rows_of,
    of_inputs,
    of_places,
    past_of,
    row_numbers,
)

__all__ = ["BATCHES_FAULTS", "LENGTHS_FAULTS"]


def _past_of_second_row(inputs: Arrays) -> Arrays:
    rows = np.minimum(np.arange(num_rows_of(inputs)), 1)
    return {name: array[rows] for name, array in inputs.items() if name.startswith("past_key_values")}


def _mask_of_first_two(inputs: Arrays) -> Arrays:
    mask = inputs["attention_mask"]
    return {"attention_mask": np.where(np.arange(len(mask))[:, None] < 2, mask, 1)}


def _rolled(name: str, when: Callable[[Arrays], bool]) -> Callable[[Arrays], Arrays]:
    return lambda inputs: {name: np.roll(inputs[name], 1, axis=0)} if when(inputs) else {}


def _batch_of(size: int) -> Callable[[Arrays], Array | bool]:
    return lambda inputs: (num_rows_of(inputs) == size) & (row_numbers(inputs) == size - 1)


def _seen_when_decoding(rows: Callable[[int], bool]) -> Callable[[Arrays], Arrays]:
    def change(inputs: Arrays) -> Arrays:
        decodes = length_of(inputs) == 1 and past_of(inputs) > 0 and rows(num_rows_of(inputs))
        return {"attention_mask": np.ones_like(inputs["attention_mask"])} if decodes else {}

    return change


BATCHES_FAULTS = [
    of_inputs(
        "batches",
        "past_of_two_rows_for_all",
        "rows after the second read the past of the second",
        _past_of_second_row,
        cached,
        rows_above(2),
    ),
    of_inputs(
        "batches",
        "padding_of_two_rows",
        "padding is seen in rows after the second",
        _mask_of_first_two,
        masked,
        rows_above(2),
    ),
    of_inputs(
        "batches",
        "past_of_the_row_before",
        "in batches of more than two rows, every row reads the past of the previous one",
        _rolled("past_key_values.value", lambda inputs: num_rows_of(inputs) > 2),
        cached,
        rows_above(2),
    ),
    of_places(
        "batches",
        "decoding_above_two_rows_off",
        "off for one token after a past in the third row and later",
        lambda inputs: (row_numbers(inputs) >= 2) & (length_of(inputs) == 1) & (past_of(inputs) > 0),
        cached,
        rows_above(2),
    ),
    *(
        of_places(
            "batches", f"batch_of_{size}_off", f"off in the last row of {size}", _batch_of(size), rows_above(size - 1)
        )
        for size in (3, 4, 5, 6, 7, 8)
    ),
    of_places(
        "batches",
        "rows_above_eight_off",
        "off in the ninth row and later if there is more than one position",
        lambda inputs: (row_numbers(inputs) >= 8) & (length_of(inputs) > 1),
        rows_above(8),
    ),
    of_inputs(
        "batches",
        "padding_seen_when_decoding_alone",
        "a single row sees its padding when decoding",
        _seen_when_decoding(lambda rows: rows == 1),
        cached,
    ),
    of_inputs(
        "batches",
        "padding_seen_when_decoding_many",
        "three rows or more see their padding when decoding",
        _seen_when_decoding(lambda rows: rows > 2),
        cached,
        rows_above(2),
    ),
]


def _padded_decoding_off(inputs: Arrays) -> Array | bool:
    padded: Array = (inputs["attention_mask"] == 0).any(axis=1, keepdims=True)
    return padded if length_of(inputs) == 1 and past_of(inputs) > 16 else False


LENGTHS_FAULTS = [
    of_places(
        "lengths",
        "lengths_above_129_off",
        "off at the end of sequences of more than 129 positions",
        lambda inputs: (length_of(inputs) > 129) & (np.arange(length_of(inputs)) == length_of(inputs) - 1),
        longer_than(160),
    ),
    of_places(
        "lengths",
        "octave_off",
        "off from 257 to 511 positions",
        lambda inputs: 256 < length_of(inputs) < 512,
        longer_than(511),
    ),
    of_places(
        "lengths",
        "queries_above_400_off",
        "off from the 401st query on",
        lambda inputs: np.arange(length_of(inputs)) >= 400,
        longer_than(500),
    ),
    of_places(
        "lengths",
        "first_query_off_when_long",
        "off at the first position of more than 300",
        lambda inputs: (np.arange(length_of(inputs)) == 0) & (length_of(inputs) > 300),
        longer_than(320),
    ),
    of_places(
        "lengths",
        "padding_off_when_long",
        "off in padded rows of more than 100 positions",
        lambda inputs: (inputs["attention_mask"] == 0).any(axis=1, keepdims=True) & (length_of(inputs) > 100),
        masked,
        longer_than(120),
    ),
    of_places(
        "lengths",
        "pasts_above_130_off",
        "off for several tokens after a past of more than 130",
        lambda inputs: (past_of(inputs) > 130) & (length_of(inputs) > 1),
        cached,
        longer_than(300),
    ),
    of_places(
        "lengths",
        "padded_decoding_off",
        "off for one token after a padded past of more than 16",
        _padded_decoding_off,
        cached,
    ),
    of_inputs(
        "lengths",
        "past_beyond_256_lost",
        "the past is zero before its last 256 tokens",
        lambda inputs: {
            name: np.where(np.arange(past_of(inputs))[:, None] < past_of(inputs) - 256, 0, array)
            for name, array in inputs.items()
            if name.startswith("past_key_values")
        },
        cached,
        longer_than(400),
    ),
]
