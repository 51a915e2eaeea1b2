"""Faults of runtimes that are wrong for some inputs only: masks, batches, lengths and values that few cases have."""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.conditions import cached, float32, has_rope, masked
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of

__all__ = ["SOME_INPUTS_FAULTS"]

Arrays = dict[str, Array]
Change = Callable[[Arrays], Arrays]
Choose = Callable[[Arrays], Array]

# What a right result is multiplied with where it is to be wrong: far above rounding in any dtype.
_WRONG = 1.1


def _input_fault(name: str, breaks: str, change: Change, *conditions: When) -> Fault:
    """The runtime computes rightly what it was not asked."""
    return Fault(
        name=name,
        place="runtime",
        breaks=breaks,
        wrap=lambda run: lambda inputs: run(change(inputs)),
        applies=all_of(*conditions),
    )


def _output_fault(name: str, breaks: str, where: Choose, *conditions: When) -> Fault:
    """The output is wrong where ``where`` says so, by tokens ``[B, S]`` or as a whole."""

    def changed(inputs: Arrays, outputs: Arrays) -> Arrays:
        output = outputs["output"]
        wrong = np.broadcast_to(where(inputs), output.shape[:2])[..., None]
        return {**outputs, "output": np.where(wrong, output * _WRONG, output).astype(output.dtype)}

    return Fault(
        name=name,
        place="runtime",
        breaks=breaks,
        wrap=lambda run: lambda inputs: changed(inputs, run(inputs)),
        applies=all_of(*conditions),
    )


def _mask_of(inputs: Arrays, mask: Array) -> Arrays:
    return {**inputs, "attention_mask": np.ascontiguousarray(np.broadcast_to(mask, inputs["attention_mask"].shape))}


def _last_row_alone(inputs: Arrays) -> Arrays:
    mask = np.ones_like(inputs["attention_mask"])
    mask[-1] = inputs["attention_mask"][-1]
    return _mask_of(inputs, mask)


def _positions_from_mask(inputs: Arrays) -> Arrays:
    length = inputs["hidden_states"].shape[1]
    counted = np.maximum(inputs["attention_mask"].cumsum(axis=1) - 1, 0)
    return {**inputs, "position_ids": np.ascontiguousarray(counted[:, -length:])}


def _without_mask_in_decoding(inputs: Arrays) -> Arrays:
    is_step = inputs["hidden_states"].shape[1] == 1 and inputs["attention_mask"].shape[1] > 1
    return _mask_of(inputs, np.ones_like(inputs["attention_mask"])) if is_step else inputs


def _states(change: Callable[[Array], Array]) -> Change:
    def changed(inputs: Arrays) -> Arrays:
        states = inputs["hidden_states"]
        return {**inputs, "hidden_states": change(states.astype(np.float32)).astype(states.dtype)}

    return changed


def _total(inputs: Arrays) -> int:
    mask = inputs.get("attention_mask")
    return int(inputs["hidden_states"].shape[1] if mask is None else mask.shape[1])


def _size(inputs: Arrays) -> Array:
    """Root mean square of each token, ``[B, S]``."""
    size: Array = np.sqrt(np.mean(np.square(inputs["hidden_states"].astype(np.float64)), axis=-1))
    return size


def _rows_from(number: int) -> Choose:
    return lambda inputs: (np.arange(len(inputs["hidden_states"])) >= number)[:, None]


def _longer_than(length: int) -> When:
    return lambda target: target.spec.axes["sequence_length"].max > length


def _more_rows_than(number: int) -> When:
    def holds(target: FaultTarget) -> bool:
        return target.spec.axes["batch_size"].max > number

    return holds


def _repeats(inputs: Arrays) -> Array:
    """Tokens that are equal to the one before."""
    states = inputs["hidden_states"]
    equal = np.zeros(states.shape[:2], bool)
    # All the same is what the constant cases have.
    if not (states == states[:, :1]).all():
        equal[:, 1:] = (states[:, 1:] == states[:, :-1]).all(axis=-1) & states[:, 1:].any(axis=-1)
    return equal


def _batches_of(number: int) -> Choose:
    return lambda inputs: np.array(len(inputs["hidden_states"]) == number)


def _above(length: int) -> Choose:
    return lambda inputs: np.array(_total(inputs) > length)


def _of_size(smallest: float, largest: float) -> Choose:
    return lambda inputs: (_size(inputs) >= smallest) & (_size(inputs) <= largest)


def _with_mean_above(least: float) -> Choose:
    return lambda inputs: np.abs(inputs["hidden_states"].astype(np.float64).mean(axis=-1)) > least


def _dropped_above(most: float) -> Change:
    return _states(lambda x: np.where(np.abs(x) > most, 0, x))


def _nan_everywhere(inputs: Arrays, outputs: Arrays) -> Arrays:
    has_nan = bool(np.isnan(inputs["hidden_states"].astype(np.float32)).any())
    return {**outputs, "output": outputs["output"] * np.nan} if has_nan else outputs


SOME_INPUTS_FAULTS = [
    _input_fault(
        "run_mask_of_the_last_row_for_all",
        "every row has the padding of the last",
        lambda inputs: _mask_of(inputs, inputs["attention_mask"][-1:]),
        masked,
    ),
    _input_fault("run_mask_of_the_last_row_alone", "only the last row has padding", _last_row_alone, masked),
    _input_fault(
        "run_positions_from_the_mask", "positions are counted from the mask", _positions_from_mask, masked, has_rope
    ),
    _input_fault("run_mask_lost_in_decoding", "a single token sees padding", _without_mask_in_decoding, cached),
    _output_fault("run_wrong_from_the_fourth_row", "rows from the fourth on", _rows_from(3), _more_rows_than(3)),
    _output_fault("run_wrong_in_batches_of_five", "batches of 5", _batches_of(5), _more_rows_than(4)),
    _output_fault("run_wrong_above_130_tokens", "sequences of more than 130", _above(130), _longer_than(130)),
    _input_fault("run_clamped_at_50", "hidden states above 50 are 50", _states(lambda x: np.clip(x, -50, 50)), float32),
    _input_fault("run_outliers_dropped", "channels above 50 are 0", _dropped_above(50), float32),
    _output_fault("run_wrong_for_tokens_of_some_size", "tokens of a size from 1.6 to 5", _of_size(1.6, 5.0), float32),
    _output_fault("run_wrong_for_zero_tokens", "tokens that are 0", _of_size(0.0, 0.0)),
    _output_fault("run_wrong_for_repeated_tokens", "tokens that come again", _repeats),
    _input_fault("run_nan_is_zero", "NaN counts as 0", _states(np.nan_to_num)),
    Fault(
        name="run_nan_spreads",
        place="runtime",
        breaks="NaN in one row is NaN in all",
        wrap=lambda run: lambda inputs: _nan_everywhere(inputs, run(inputs)),
        applies=_more_rows_than(1),
    ),
    _output_fault("run_wrong_around_an_offset", "tokens whose mean is far from 0", _with_mean_above(5.0)),
]
