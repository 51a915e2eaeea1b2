"""Registration of faults that only some legal inputs reveal: the artifact reads modified inputs, or is off in places.

Each wraps a runtime, so that every format can have it without another export.
"""

from collections.abc import Callable

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.selftest.fault import Fault, When, all_of

__all__ = ["Arrays", "length_of", "num_rows_of", "of_inputs", "of_places", "past_of", "row_numbers"]

Arrays = dict[str, Array]
Run = Callable[[Arrays], Arrays]

# An error far above every budget, but far too small to be seen in a plot.
_OFF = 1.05


def of_inputs(family: str, name: str, breaks: str, change: Callable[[Arrays], Arrays], *conditions: When) -> Fault:
    """Create a fault in which the artifact computes the correct result for inputs that ``change`` has modified."""

    def wrap(run: Run) -> Run:
        return lambda inputs: run({**inputs, **change(inputs)})

    return _fault(family, name, breaks, wrap, *conditions)


def of_places(
    family: str,
    name: str,
    breaks: str,
    where: Callable[[Arrays], Array | bool],
    *conditions: When,
    factor: float = _OFF,
    provable: bool = True,
) -> Fault:
    """Create a fault in which the output is multiplied by ``factor`` where ``where`` is true.

    The result of ``where`` must be broadcastable to ``[B, S]``.
    """

    def wrap(run: Run) -> Run:
        def wrong(inputs: Arrays) -> Arrays:
            outputs = run(inputs)
            output = outputs["output"]
            shape = output.shape[:2]
            hit = np.broadcast_to(where(inputs), shape)[:, :, None]
            with np.errstate(invalid="ignore", over="ignore"):
                changed = np.where(hit, output.astype(np.float64) * factor, output).astype(output.dtype)
            return {**outputs, "output": changed}

        return wrong

    return _fault(family, name, breaks, wrap, *conditions, provable=provable)


def _fault(
    family: str, name: str, breaks: str, wrap: Callable[[Run], Run], *conditions: When, provable: bool = True
) -> Fault:
    return Fault(
        name=name,
        place="runtime",
        breaks=breaks,
        wrap=wrap,
        applies=all_of(*conditions),
        family=family,
        provable=provable,
    )


def num_rows_of(inputs: Arrays) -> int:
    """Number of rows of a batch."""
    return len(inputs["hidden_states"])


def length_of(inputs: Arrays) -> int:
    """Number of new positions."""
    return int(inputs["hidden_states"].shape[1])


def past_of(inputs: Arrays) -> int:
    """Number of tokens in the cache."""
    return int(inputs["past_key_values.key"].shape[2]) if "past_key_values.key" in inputs else 0


def row_numbers(inputs: Arrays) -> Array:
    """Indices of the rows, ``[B, 1]``."""
    return np.arange(num_rows_of(inputs))[:, None]
