"""Faults in the runtime: correct artifacts whose results are changed on the way, sometimes or always."""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.conditions import LONG, cached, float32, longer_than_64, masked
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of

__all__ = ["RUNTIME_FAULTS"]

Arrays = dict[str, Array]
Run = Callable[[Arrays], Arrays]
# Function from inputs and outputs to the outputs that are returned instead.
Change = Callable[[Arrays, Arrays], Arrays]

# Inputs of the kind `tiny` have a standard deviation of 1e-3, those of `large` of 8, all others of 1.
_TINY, _LARGE = 0.01, 16
# All cases but those of the largest batch have one or two rows.
_ROWS_KEPT = 2


def _fault(name: str, breaks: str, change: Change, *conditions: When) -> Fault:
    def wrap(run: Run) -> Run:
        return lambda inputs: change(inputs, run(inputs))

    return _wrapping(name, breaks, wrap, *conditions)


def _wrapping(name: str, breaks: str, wrap: Callable[[Run], Run], *conditions: When) -> Fault:
    return Fault(
        name=name,
        place="runtime",
        breaks=breaks,
        wrap=wrap,
        applies=all_of(*conditions),
    )


def _with_output(outputs: Arrays, output: Array) -> Arrays:
    # Some faults compute in fp64, but only one of them should be detected by its dtype.
    return {**outputs, "output": output.astype(outputs["output"].dtype)}


def _nan_at_length_one(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"]
    return _with_output(outputs, output * np.nan if output.shape[1] == 1 else output)


def _last_token_lost_when_long(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"].copy()
    if output.shape[1] > LONG:
        output[:, -1] = 0
    return _with_output(outputs, output)


def _batches_above_two(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"].copy()
    output[_ROWS_KEPT:] = 0
    return _with_output(outputs, output)


def _first_row_for_all(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"]
    return _with_output(outputs, np.broadcast_to(output[:1], output.shape).copy())


def _rows_leak(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"].astype(np.float64)
    return _with_output(outputs, output + 1e-2 * (output.mean(axis=0, keepdims=True) - output))


def _future_leaks(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"].copy()
    output[:, :-1] = 0.99 * output[:, :-1] + 0.01 * output[:, 1:]
    return _with_output(outputs, output)


def _random_noise(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"].astype(np.float64)
    # Unseeded, since the noise must differ in each call; otherwise, the check of determinism would pass.
    noise = np.random.default_rng().standard_normal(output.shape)
    return _with_output(outputs, output + 0.05 * np.abs(output).max(initial=0.0) * noise)


def _random_last_bits(inputs: Arrays, outputs: Arrays) -> Arrays:
    """Change numbers by no more than rounding does, differently in every call."""
    output = outputs["output"].copy()
    # The last bit flips in about half of the elements, which no error budget could distinguish from rounding.
    bits = output.view(f"uint{8 * output.dtype.itemsize}")
    bits ^= np.random.default_rng().integers(0, 2, bits.shape, dtype=bits.dtype)
    return _with_output(outputs, output)


def _half_precision(inputs: Arrays, outputs: Arrays) -> Arrays:
    return _with_output(outputs, outputs["output"].astype(np.float16))


def _another_dtype(inputs: Arrays, outputs: Arrays) -> Arrays:
    return {**outputs, "output": outputs["output"].astype(np.float64)}


def _lost_batch_axis(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"]
    return {**outputs, "output": output[0] if len(output) == 1 else output}


def _tiny_is_zero(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"]
    return _with_output(outputs, output * 0 if np.abs(inputs["hidden_states"]).max() < _TINY else output)


def _large_is_infinite(inputs: Arrays, outputs: Arrays) -> Arrays:
    output = outputs["output"]
    return _with_output(outputs, output + np.inf if np.abs(inputs["hidden_states"]).max() > _LARGE else output)


def _padding_leaks(inputs: Arrays, outputs: Arrays) -> Arrays:
    hidden = inputs["attention_mask"] == 0
    output = outputs["output"].astype(np.float64)
    # Only rows with padding, so that only cases with a mask can detect it.
    leak = 0.05 * np.abs(output).max(initial=0.0) * hidden.any(axis=1)[:, None, None]
    return _with_output(outputs, output + leak)


def _cache_shifted(inputs: Arrays, outputs: Arrays) -> Arrays:
    # The output is correct, and only the input of the next step is wrong.
    return {**outputs, "present.key": np.roll(outputs["present.key"], 1, axis=2)}


def _earlier_result(run: Run) -> Run:
    """Reuse the result of the previous call if it had the same shape."""
    kept: Arrays = {}

    def wrong(inputs: Arrays) -> Arrays:
        outputs = run(inputs)
        if "output" not in kept or kept["output"].shape != outputs["output"].shape:
            kept.update(outputs)
        return dict(kept)

    return wrong


def _fails_at_length_one(run: Run) -> Run:
    def wrong(inputs: Arrays) -> Arrays:
        if inputs["hidden_states"].shape[1] == 1:
            raise RuntimeError("sizes of 1 were not traced")
        return run(inputs)

    return wrong


def _several_rows(target: FaultTarget) -> bool:
    return target.spec.axes["batch_size"].max > _ROWS_KEPT


RUNTIME_FAULTS = [
    _fault("run_nan_at_length_one", "NaN for a single position", _nan_at_length_one),
    _fault(
        "run_last_token_lost_when_long",
        "0 at the end of more than 64 positions",
        _last_token_lost_when_long,
        longer_than_64,
    ),
    _fault("run_rows_above_two_lost", "0 from the third row of a batch on", _batches_above_two, _several_rows),
    _fault("run_first_row_for_all", "every row gets the result of the first", _first_row_for_all),
    _fault("run_rows_leak", "1 % of the batch's mean in every row", _rows_leak),
    _fault("run_future_leaks", "1 % of the next position's result", _future_leaks),
    _fault("run_random_noise", "noise that differs in every call", _random_noise),
    _fault("run_random_last_bits", "last bits that differ in every call", _random_last_bits),
    _fault("run_half_precision", "the output was rounded to float16", _half_precision, float32),
    _fault("run_another_dtype", "the output is float64", _another_dtype),
    _fault("run_lost_batch_axis", "a batch of one is returned without its axis", _lost_batch_axis),
    _fault("run_tiny_is_zero", "small inputs give 0", _tiny_is_zero),
    _fault("run_large_is_infinite", "large inputs give infinity", _large_is_infinite),
    _fault("run_padding_leaks", "rows with padding are off", _padding_leaks, masked),
    _fault("run_cache_shifted", "the returned keys are one position off", _cache_shifted, cached),
    _wrapping("run_earlier_result", "the result of an earlier call with the same shape", _earlier_result),
    _wrapping("run_fails_at_length_one", "an exception for a single position", _fails_at_length_one),
]
