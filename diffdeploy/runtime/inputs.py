"""Checks of the names, dtypes, shapes, ranges and values of a graph's inputs, before a backend sees them."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec, TensorSpec

__all__ = ["as_integers", "check_inputs", "check_size", "check_values"]


def as_integers(spec: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert boolean masks among the inputs to the 0 and 1 that graphs take."""
    return {
        name: value * _one(value) if name in spec.inputs and _is_boolean_mask(spec.inputs[name], value) else value
        for name, value in inputs.items()
    }


def _is_boolean_mask(spec: TensorSpec, value: Any) -> bool:
    is_mask = spec.values is not None and (spec.values.min, spec.values.max) == (0, 1)
    return is_mask and _name(getattr(value, "dtype", "")) == "bool"


def _one(value: Any) -> Any:
    """Factor 1 that turns booleans into int64: a numpy scalar for arrays, or a Python number for torch tensors."""
    return np.int64(1) if isinstance(value, np.ndarray) else 1


def check_inputs(spec: GraphSpec, inputs: Mapping[str, Any]) -> None:
    """Check inputs against the interface that the graph declares.

    Args:
        spec: interface of the graph.
        inputs: torch tensors or numpy arrays by name.

    Raises:
        InputError: a name, dtype, shape or value is not what ``spec`` accepts. Values of tensors on CUDA are not
            checked, since that would wait for the device.
    """
    if inputs.keys() != spec.inputs.keys():
        raise InputError(f"inputs are {sorted(inputs)}; accepted: {sorted(spec.inputs)}")
    sizes: dict[str, int] = {}
    for name, tensor in spec.inputs.items():
        _check_tensor(spec, name, tensor, inputs[name], sizes)
    for total, parts in spec.sums.items():
        if sizes[total] != sum(sizes[part] for part in parts):
            given = " + ".join(f"{part} {sizes[part]}" for part in parts)
            raise InputError(f"{total} is {sizes[total]}; accepted: {given}")


def _check_tensor(graph: GraphSpec, name: str, spec: TensorSpec, value: Any, sizes: dict[str, int]) -> None:
    # Identified by attributes and not by type, since a runtime without torch has no torch types.
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise InputError(f"{name} is a {type(value).__name__}; accepted: a torch tensor or a numpy array")
    dtype = _name(value.dtype)
    if dtype != spec.dtype:
        raise InputError(f"{name} has dtype {dtype}; accepted: {spec.dtype}")
    if len(value.shape) != len(spec.shape):
        raise InputError(f"{name} has shape {list(value.shape)}; accepted: {list(spec.shape)}")
    for given, axis in zip(value.shape, spec.shape, strict=True):
        if isinstance(axis, str):
            _check_size(graph, name, axis, given, sizes)
        elif given != axis:
            raise InputError(f"{name} has shape {list(value.shape)}; accepted: {list(spec.shape)}")
    # Values on CUDA are not checked, since that would wait for the device in every call.
    if not getattr(value, "is_cuda", False):
        check_values(name, spec, value)


def check_values(name: str, spec: TensorSpec, value: Any) -> None:
    """Check the values of a tensor or an array.

    Raises:
        InputError: a value is out of the range of ``spec``.
    """
    if spec.values is None:
        return
    smallest, largest = _extremes(value)
    if smallest < spec.values.min or largest > spec.values.max:
        raise InputError(
            f"{name} holds numbers from {smallest} to {largest}; accepted: {spec.values.min} to {spec.values.max}"
        )


def _check_size(graph: GraphSpec, name: str, axis: str, given: int, sizes: dict[str, int]) -> None:
    """Check the size of a named axis; ``sizes`` holds the sizes from other inputs, and this one is added."""
    check_size(graph, name, axis, given)
    if sizes.setdefault(axis, given) != given:
        raise InputError(f"{axis} is {given} in {name}, but {sizes[axis]} in another input")


def check_size(graph: GraphSpec, name: str, axis: str, given: int) -> None:
    """Check the size of an axis of an input.

    Raises:
        InputError: the graph does not accept it.
    """
    bounds = graph.axes[axis]
    if not bounds.min <= given <= bounds.max:
        raise InputError(f"{axis} of {name} is {given}; accepted: {bounds.min} to {bounds.max}")


@cache
def _name(dtype: Any) -> str:
    """Name of a dtype of torch or numpy, cached since formatting it takes time."""
    return str(dtype).removeprefix("torch.")


def _extremes(integers: Any) -> tuple[int, int]:
    """Smallest and largest value of a tensor or an array."""
    if isinstance(integers, np.ndarray):
        return int(np.minimum.reduce(integers, axis=None)), int(np.maximum.reduce(integers, axis=None))
    smallest, largest = integers.aminmax()
    return int(smallest), int(largest)
