"""Constants of an ONNX model: initializers, found by their values, and attributes of nodes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffdeploy.arrays import Array, epsilon
from diffdeploy.formats.onnx.external import load_model, remove_external_data
from diffdeploy.formats.onnx.names import MODEL

if TYPE_CHECKING:
    import onnx

__all__ = ["read", "write"]

_ATTRIBUTES = {"norm_eps": "epsilon", "softmax_scale": "scale"}

# Attributes are float32, which rounds by 6e-8 at most.
_RELATIVE_ERROR = 1e-6

# Allowed error of a number that was computed in fp32, in epsilons of the dtype; nine of ten lambdas are within two.
_ROUNDINGS = 4


class _Place(NamedTuple):
    """Location of a constant: an initializer, possibly transposed, or an attribute of some nodes."""

    tensor: "onnx.TensorProto | None"
    transposed: bool
    attributes: "list[onnx.AttributeProto]"


def read(directory: Path, expected: Mapping[str, Array]) -> set[str]:
    """Names of the expected constants that the model contains."""
    return set(_places(load_model(directory), expected))


def write(directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
    """Replace constants and save the model."""
    import onnx

    model = load_model(directory)
    places = _places(model, expected)
    for name, array in changes.items():
        tensor, transposed, attributes = places[name]
        for attribute in attributes:
            attribute.f = float(array)
        if tensor is not None:
            old = onnx.numpy_helper.to_array(tensor)
            new = np.ascontiguousarray(array.T if transposed else array).astype(old.dtype).reshape(old.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
    remove_external_data(directory)
    onnx.save(model, directory / MODEL)


def _places(model: "onnx.ModelProto", expected: Mapping[str, Array]) -> dict[str, _Place]:
    import onnx

    left = {tensor.name: (tensor, onnx.numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    places = {}
    for name, wanted in expected.items():
        attributes = [] if name not in _ATTRIBUTES else list(_attributes(model, _ATTRIBUTES[name], float(wanted)))
        if attributes:
            places[name] = _Place(None, False, attributes)
            continue
        for key, (tensor, held) in left.items():
            if (transposed := _holds(held, wanted)) is not None:
                places[name] = _Place(tensor, transposed, [])
                # Equal constants, such as norms that are all 1, share one initializer.
                del left[key]
                break
    return places


def _attributes(model: "onnx.ModelProto", name: str, value: float) -> "Iterator[onnx.AttributeProto]":
    for node in model.graph.node:
        yield from (a for a in node.attribute if a.name == name and np.isclose(a.f, value, rtol=_RELATIVE_ERROR))


def _holds(held: Array, wanted: Array) -> bool | None:
    """True if ``held`` is ``wanted`` transposed, false if it is ``wanted``, up to rounding; ``None`` for neither."""
    # V is the kind of bfloat16 in numpy without ml_dtypes.
    if held.dtype.kind not in "fV" or (wanted.ndim and held.size != wanted.size):
        return None
    if wanted.ndim == 0:
        near = held.size == 1 and np.isclose(
            float(held.reshape(())), float(wanted), rtol=_ROUNDINGS * epsilon(held.dtype)
        )
        return False if near else None
    forms = [(wanted, False), *([(wanted.T, True)] if wanted.ndim == 2 else [])]
    for form, transposed in forms:
        if held.shape == form.shape and np.allclose(
            held.astype(np.float64), form.astype(np.float64), rtol=0, atol=_rounding(held, wanted)
        ):
            return transposed
    return None


def _rounding(held: Array, wanted: Array) -> float:
    """Tolerance of rounding: weights must be bit-identical; tables, which are given in float64, are rounded once."""
    return epsilon(held.dtype) if wanted.dtype == np.float64 else 0.0
