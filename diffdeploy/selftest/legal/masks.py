"""Faults that only some masks and positions reveal, such as masks of single rows or with little or much padding."""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.conditions import has_positions, masked, rows_above
from diffdeploy.selftest.legal.wrapping import Arrays, length_of, of_inputs, of_places, past_of
from diffdeploy.verify.values import counted_positions

__all__ = ["MASKS_FAULTS", "POSITIONS_FAULTS"]


def _mask_where(rows: Callable[[Array], Array], value: Callable[[Array], Array]) -> Callable[[Arrays], Arrays]:
    """Function that replaces the masks ``[B, T]`` of the rows that ``rows`` selects."""

    def change(inputs: Arrays) -> Arrays:
        mask = inputs["attention_mask"]
        return {"attention_mask": np.where(rows(mask)[:, None], value(mask), mask)}

    return change


def _share(mask: Array) -> Array:
    """Share of each row that is padding."""
    hidden: Array = np.mean(mask == 0, axis=1)
    return hidden


def _others_than_last(mask: Array) -> Array:
    return np.arange(len(mask)) < len(mask) - 1


def _all_rows(mask: Array) -> Array:
    return np.ones(len(mask), dtype=bool)


def _shows_some(mask: Array) -> Array:
    """Rows with a token; in a row without one, all padding would become visible."""
    some: Array = mask.max(axis=1) > 0
    return some


def _without_oldest(mask: Array) -> Array:
    """Mask that hides the first token of each row."""
    others: Array = mask.copy()
    others[np.arange(len(mask)), np.argmax(mask, axis=1)] = 0
    return others


def _filled(mask: Array) -> Array:
    """Mask that shows every token between the first and the last one."""
    after = np.maximum.accumulate(mask, axis=1)
    before = np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    between: Array = after * before
    return between


def _pushed_right(mask: Array) -> Array:
    """Mask with the same number of tokens, all at the end, as in a graph that uses only that number."""
    return np.sort(mask, axis=1)


def _cut(mask: Array) -> Array:
    """Mask with the same number of tokens, in one run, as in a graph that uses an offset and a count."""
    start = np.argmax(mask, axis=1)[:, None]
    places = np.arange(mask.shape[1])
    run: Array = (places >= start) & (places < start + mask.sum(axis=1, keepdims=True))
    return run.astype(mask.dtype)


MASKS_FAULTS = [
    of_inputs(
        "masks",
        "mask_of_the_last_row_for_all",
        "every row has the padding of the last",
        _mask_where(_all_rows, lambda mask: np.broadcast_to(mask[-1:], mask.shape)),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "mask_of_the_first_row_for_all",
        "every row has the padding of the first",
        _mask_where(_all_rows, lambda mask: np.broadcast_to(mask[:1], mask.shape)),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "padding_of_the_last_row_alone",
        "padding of all rows but the last is seen",
        _mask_where(_others_than_last, np.ones_like),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "masks_of_rows_joined",
        "a token that is hidden in one row is hidden in all",
        _mask_where(_all_rows, lambda mask: np.broadcast_to(mask.min(axis=0, keepdims=True), mask.shape)),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "little_padding_seen",
        "padding of less than a quarter of a row is seen",
        _mask_where(lambda mask: _share(mask) < 0.25, np.ones_like),
        masked,
    ),
    of_inputs(
        "masks",
        "much_padding_seen",
        "padding of more than three quarters of a row, but not all of it, is seen",
        _mask_where(lambda mask: (_share(mask) > 0.75) & (_share(mask) < 1), np.ones_like),
        masked,
    ),
    of_inputs(
        "masks",
        "padding_in_front_seen",
        "padding before the first token of a row is seen",
        _mask_where(_shows_some, lambda mask: np.where(np.maximum.accumulate(mask, axis=1) == 0, 1, mask)),
        masked,
    ),
    of_inputs(
        "masks",
        "padding_behind_seen",
        "padding after the last token of a row is seen",
        _mask_where(
            _shows_some, lambda mask: np.where(np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1] == 0, 1, mask)
        ),
        masked,
    ),
    of_inputs(
        "masks",
        "oldest_token_hidden",
        "the first token of a row is hidden if there are others",
        _mask_where(lambda mask: mask.sum(axis=1) > 1, _without_oldest),
        masked,
    ),
    of_inputs(
        "masks",
        "padding_of_the_first_row_alone",
        "padding of all rows but the first is seen",
        _mask_where(lambda mask: np.arange(len(mask)) > 0, np.ones_like),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "one_hidden_token_seen",
        "the only hidden token of a row is seen",
        _mask_where(lambda mask: (mask == 0).sum(axis=1) == 1, np.ones_like),
        masked,
    ),
    of_inputs(
        "masks",
        "holes_of_other_rows_filled",
        "holes between tokens are seen in all rows but the last",
        _mask_where(_others_than_last, _filled),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "mask_of_other_rows_pushed_right",
        "all rows but the last are treated as padded on the left",
        _mask_where(_others_than_last, _pushed_right),
        masked,
        rows_above(1),
    ),
    of_inputs(
        "masks",
        "mask_of_other_rows_in_one_piece",
        "all rows but the last have one contiguous run of tokens",
        _mask_where(_others_than_last, _cut),
        masked,
        rows_above(1),
    ),
    of_places(
        "masks",
        "rows_of_unequal_padding_off",
        "off where two rows hide different numbers of tokens, neither of which is 0",
        lambda inputs: len({*np.sum(inputs["attention_mask"] == 0, axis=1)} - {0}) > 1,
        masked,
        rows_above(1),
    ),
]


def _counted(inputs: Arrays) -> Arrays:
    return {"position_ids": counted_positions(inputs["attention_mask"], past_of(inputs))}


def _counted_on(inputs: Arrays) -> Arrays:
    first = inputs["position_ids"][:, :1]
    highest = inputs["position_ids"].max()
    return {"position_ids": np.minimum(first + np.arange(length_of(inputs)), highest)}


POSITIONS_FAULTS = [
    of_inputs("positions", "positions_from_the_mask", "positions are counted from the mask", _counted, has_positions),
    of_inputs(
        "positions",
        "positions_below_the_number_of_tokens",
        "positions are limited to less than the length of the mask",
        lambda inputs: {"position_ids": np.minimum(inputs["position_ids"], inputs["attention_mask"].shape[1] - 1)},
        has_positions,
    ),
    of_inputs(
        "positions",
        "positions_of_the_first_row_for_all",
        "every row has the positions of the first",
        lambda inputs: {"position_ids": np.broadcast_to(inputs["position_ids"][:1], inputs["position_ids"].shape)},
        has_positions,
        rows_above(1),
    ),
    of_inputs(
        "positions",
        "positions_ascend",
        "a position is never below the previous one",
        lambda inputs: {"position_ids": np.maximum.accumulate(inputs["position_ids"], axis=1)},
        has_positions,
    ),
    of_inputs(
        "positions",
        "positions_counted_from_the_first",
        "positions are counted on from the first one of a row",
        _counted_on,
        has_positions,
    ),
]
