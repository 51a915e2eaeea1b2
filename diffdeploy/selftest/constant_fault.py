"""Entering faults in an artifact's constants into a table, and the changes of arrays that several of them share."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats.expected import expected_constants
from diffdeploy.graphs import Stage
from diffdeploy.selftest.fault import Fault, FaultTarget, When, all_of

__all__ = [
    "columns",
    "constant_fault",
    "flipped",
    "next_bit",
    "reordered",
    "rows",
    "scalar",
    "times",
]


def constant_fault(
    name: str, stage: Stage, breaks: str, change: Callable[[FaultTarget], Mapping[str, Array]], *conditions: When
) -> Fault:
    """A fault that `change`, the constants that are others, says all of.

    It applies where all conditions hold and the artifact has those constants.
    """

    def is_held(target: FaultTarget) -> bool:
        # Where the artifact folds a constant away, there is nothing to change.
        return change(target).keys() <= target.constants.keys()

    def inject(target: FaultTarget) -> None:
        # Formats find a constant by its right value, not by a name.
        expected = expected_constants(target.manifest, target.weights)
        target.format.write_constants(target.path, expected, change(target))

    return Fault(
        name=name,
        place="constants",
        breaks=breaks,
        stage=stage,
        inject=inject,
        change=change,
        applies=all_of(*conditions, is_held),
    )


def rows(target: FaultTarget, side: str, change: Callable[[Array], Array]) -> dict[str, Array]:
    """The rows of the projection ``side`` and of its bias, changed."""
    # Both: a layout has weight and bias in one order, and a fault in one of them alone would be another fault.
    names = (f"{side}_proj.weight", f"{side}_proj.bias")
    return {name: change(target.weights[name]) for name in names if name in target.weights}


def columns(target: FaultTarget, change: Callable[[Array], Array]) -> dict[str, Array]:
    """The columns of the output projection, changed."""
    return {"out_proj.weight": np.ascontiguousarray(change(target.weights["out_proj.weight"].T).T)}


def scalar(name: str, value: float) -> dict[str, Array]:
    """One number."""
    # In fp64, as all numbers of `expected_constants`; the format rounds it as it did the right one.
    return {name: np.asarray(value, np.float64)}


def flipped(shape: tuple[int, ...], axis: int) -> Callable[[Array], Array]:
    """Rows ``[*shape, rest]`` in reverse order along one axis."""

    def change(array: Array) -> Array:
        grid = np.flip(array.reshape(*shape, -1, *array.shape[1:]), axis)
        return np.ascontiguousarray(grid).reshape(array.shape)

    return change


def reordered(*shape: int) -> Callable[[Array], Array]:
    """Rows ``[*shape, rest]`` with the axes of ``shape`` in reverse, as another layout has them."""

    def change(array: Array) -> Array:
        grid = array.reshape(*shape, -1, *array.shape[1:])
        order = (*reversed(range(len(shape))), *range(len(shape), grid.ndim))
        return np.ascontiguousarray(grid.transpose(order)).reshape(array.shape)

    return change


def times(factor: float) -> Callable[[Array], Array]:
    """Every element multiplied."""
    # Rounded once: in half precision the factor itself would be rounded before.
    return lambda array: (array.astype(np.float64) * factor).astype(array.dtype)


def next_bit(array: Array) -> Array:
    """The largest element moved to the next number of its dtype, towards zero."""
    changed = array.copy()
    bits: np.ndarray[Any, Any] = changed.view(f"uint{8 * array.dtype.itemsize}").reshape(-1)
    # The largest is not 0, whose bits would wrap around; and towards zero no number becomes infinite.
    bits[int(np.argmax(np.abs(array.astype(np.float64))))] -= 1
    return changed
