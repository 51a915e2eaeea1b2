"""Registration of faults in an artifact's constants, and the changes to arrays that several of them share."""

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
    """Create a fault that consists of changed constants, which ``change`` returns.

    It applies if all conditions hold and the artifact has those constants.
    """

    def is_held(target: FaultTarget) -> bool:
        # A constant that the artifact folds into others cannot be changed.
        return change(target).keys() <= target.constants.keys()

    def inject(target: FaultTarget) -> None:
        # Formats find a constant by its correct value, not by a name.
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
    """Change the rows of the projection ``side`` and of its bias."""
    # Both, since a layout orders weight and bias in the same way; changing only one would be another fault.
    names = (f"{side}_proj.weight", f"{side}_proj.bias")
    return {name: change(target.weights[name]) for name in names if name in target.weights}


def columns(target: FaultTarget, change: Callable[[Array], Array]) -> dict[str, Array]:
    """Change the columns of the output projection."""
    return {"out_proj.weight": np.ascontiguousarray(change(target.weights["out_proj.weight"].T).T)}


def scalar(name: str, value: float) -> dict[str, Array]:
    """Set one number."""
    # In fp64, like all numbers of `expected_constants`; the format rounds it in the same way as the correct one.
    return {name: np.asarray(value, np.float64)}


def flipped(shape: tuple[int, ...], axis: int) -> Callable[[Array], Array]:
    """Function that reverses rows ``[*shape, rest]`` along one axis."""

    def change(array: Array) -> Array:
        grid = np.flip(array.reshape(*shape, -1, *array.shape[1:]), axis)
        return np.ascontiguousarray(grid).reshape(array.shape)

    return change


def reordered(*shape: int) -> Callable[[Array], Array]:
    """Function that reverses the axes of ``shape`` in rows ``[*shape, rest]``, as in another layout."""

    def change(array: Array) -> Array:
        grid = array.reshape(*shape, -1, *array.shape[1:])
        order = (*reversed(range(len(shape))), *range(len(shape), grid.ndim))
        return np.ascontiguousarray(grid.transpose(order)).reshape(array.shape)

    return change


def times(factor: float) -> Callable[[Array], Array]:
    """Function that multiplies every element by ``factor``."""
    # Rounded once: a factor in half precision would already be rounded.
    return lambda array: (array.astype(np.float64) * factor).astype(array.dtype)


def next_bit(array: Array) -> Array:
    """Move the largest element to the next number of its dtype, towards zero."""
    changed = array.copy()
    bits: np.ndarray[Any, Any] = changed.view(f"uint{8 * array.dtype.itemsize}").reshape(-1)
    # The bits of 0 would wrap around, but the largest element is not 0. A step towards zero never gives infinity.
    bits[int(np.argmax(np.abs(array.astype(np.float64))))] -= 1
    return changed
