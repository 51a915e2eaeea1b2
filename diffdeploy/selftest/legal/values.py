"""Faults that only some numbers in the inputs reveal.

Those that a single exact value triggers are found only by chance.
"""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.conditions import cached, longer_than, masked
from diffdeploy.selftest.legal.wrapping import Arrays, length_of, of_inputs, of_places, past_of

__all__ = ["EXACT_VALUES_FAULTS", "VALUES_FAULTS"]


def _states(change: Callable[[Array], Array]) -> Callable[[Arrays], Arrays]:
    def changed(inputs: Arrays) -> Arrays:
        x = inputs["hidden_states"]
        with np.errstate(all="ignore"):
            return {"hidden_states": change(x.astype(np.float32)).astype(x.dtype)}

    return changed


def _norms(inputs: Arrays) -> Array:
    with np.errstate(all="ignore"):
        sizes: Array = np.sqrt(np.square(inputs["hidden_states"].astype(np.float64)).sum(axis=2))
    return sizes


def _sizes(x_BSD: Array) -> Array:
    """Root mean square of each token."""
    mean: Array = np.sqrt(np.mean(np.square(x_BSD), axis=2, keepdims=True))
    return mean


def _equal_to_the_one_before(inputs: Arrays) -> Array:
    x = inputs["hidden_states"]
    same = np.zeros(x.shape[:2], dtype=bool)
    same[:, 1:] = (x[:, 1:] == x[:, :-1]).all(axis=2)
    # Sequences that repeat a single token throughout are tried elsewhere.
    same[:, 1:] &= ~same[:, 1:].all(axis=1, keepdims=True)
    return same


def _without_offset(x_BSD: Array) -> Array:
    mean = x_BSD.mean(axis=(1, 2), keepdims=True)
    return np.where(np.abs(mean) > 0.75, x_BSD - mean, x_BSD)


VALUES_FAULTS = [
    of_inputs("values", "inputs_clamped_at_50", "inputs are clamped at 50", _states(lambda x: np.clip(x, -50, 50))),
    of_inputs(
        "values", "inputs_clamped_at_1000", "inputs are clamped at 1000", _states(lambda x: np.clip(x, -1000, 1000))
    ),
    of_inputs(
        "values", "outliers_dropped", "inputs above 100 are 0", _states(lambda x: np.where(np.abs(x) > 100, 0, x))
    ),
    of_inputs(
        "values",
        "peaks_cut",
        "inputs are clamped at six times the size of their token",
        _states(lambda x: np.clip(x, -6 * _sizes(x), 6 * _sizes(x))),
    ),
    of_places(
        "values",
        "norms_between_1_6_and_5_off",
        "off for tokens with a norm from 1.6 to 5",
        lambda inputs: (_norms(inputs) > 1.6) & (_norms(inputs) < 5),
    ),
    of_places(
        "values",
        "norms_between_100_and_300_off",
        "off for tokens with a norm from 100 to 300",
        lambda inputs: (_norms(inputs) > 100) & (_norms(inputs) < 300),
    ),
    of_inputs(
        "values",
        "below_a_ten_thousandth_is_zero",
        "tokens smaller than 1e-4 are 0",
        _states(lambda x: np.where(_sizes(x) < 1e-4, 0, x)),
        lambda target: target.config.norm_eps is None or target.config.norm_eps <= 1e-5,
    ),
    of_places(
        "values",
        "large_is_infinite",
        "infinity for inputs above 1000",
        lambda inputs: np.abs(np.nan_to_num(inputs["hidden_states"].astype(np.float64))).max(axis=2) > 1000,
        factor=float("inf"),
    ),
    of_places(
        "values",
        "zero_tokens_are_nan",
        "NaN for tokens of zeros, as from a norm without epsilon",
        lambda inputs: (inputs["hidden_states"] == 0).all(axis=2),
        factor=float("nan"),
    ),
    of_places(
        "values",
        "repeated_tokens_off",
        "off for a token that equals the previous one",
        _equal_to_the_one_before,
    ),
    of_inputs(
        "values", "offset_removed", "the mean of a sequence is subtracted if it is large", _states(_without_offset)
    ),
    of_inputs(
        "values",
        "nan_is_zero",
        "NaN is treated as 0",
        _states(lambda x: np.where(np.isnan(x), np.float32(0), x)),
    ),
    of_inputs(
        "values",
        "infinity_is_large",
        "infinity is treated as a thousand",
        _states(lambda x: np.where(np.isinf(x), np.float32(1000), x)),
    ),
    of_inputs(
        "values",
        "zero_tokens_hidden",
        "tokens of zeros are treated as padding",
        lambda inputs: {
            "attention_mask": np.concatenate(
                (
                    inputs["attention_mask"][:, : past_of(inputs)],
                    inputs["attention_mask"][:, past_of(inputs) :] * (inputs["hidden_states"] != 0).any(axis=2),
                ),
                axis=1,
            )
        },
        masked,
    ),
    of_inputs(
        "values",
        "past_clamped_at_10",
        "keys and values of the past are clamped at 10",
        lambda inputs: {
            name: np.clip(array, -10, 10) for name, array in inputs.items() if name.startswith("past_key_values")
        },
        cached,
    ),
]

EXACT_VALUES_FAULTS = [
    of_places(
        "exact values",
        "length_59_off",
        "off at 59 positions, but at no other number",
        lambda inputs: length_of(inputs) == 59,
        longer_than(59),
        provable=False,
    ),
    of_places(
        "exact values",
        "one_number_off",
        "off for tokens whose first channel is exactly 0.7109375",
        lambda inputs: inputs["hidden_states"][:, :, 0] == 0.7109375,
        provable=False,
    ),
]
