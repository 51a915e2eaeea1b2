"""Conversion of arrays between numpy, torch and safetensors, including bfloat16, which numpy gets from ml_dtypes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # importing it registers bfloat16 with numpy
import numpy as np

from diffdeploy.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Array", "ArrayView", "epsilon", "read_safetensors", "smallest_normal", "to_array", "to_tensor"]

Array = np.ndarray[Any, np.dtype[Any]]

# Keys are the dtype names of the safetensors format.
_STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


def epsilon(dtype: "str | np.dtype[Any]") -> float:
    """Distance from 1 to the next larger number of a floating dtype."""
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def smallest_normal(dtype: "str | np.dtype[Any]") -> float:
    """Smallest positive number of a floating dtype at full precision (the smallest normal number)."""
    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


def to_tensor(array: Array) -> "Tensor":
    """Convert an array to a CPU tensor that shares its memory, or to a copy if the array is read-only."""
    import torch

    # torch warns about read-only memory and refuses negative strides.
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        # numpy and torch do not know each other's bfloat16, so the bits cross as int16.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: "Tensor") -> Array:
    """Convert a tensor to an array, which shares the memory of a CPU tensor."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.int16).numpy()
        return bits.view("bfloat16")
    array: Array = tensor.numpy()
    return array


class ArrayView(Mapping[str, Array]):
    """Mapping that converts tensors to arrays on access and keeps none, so that lazily read weights stay on disk.

    Args:
        tensors: tensors by name.
    """

    def __init__(self, tensors: "Mapping[str, Tensor]") -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        return to_array(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read all arrays of a file.

    Raises:
        IntegrityError: the file is not a safetensors file, or cannot be read.
    """
    from safetensors import SafetensorError, deserialize

    try:
        stored = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path.name} in {path.parent} cannot be read: {error}") from error
    for name, entry in stored:
        if entry["dtype"] not in _STORED_DTYPES:
            accepted = ", ".join(_STORED_DTYPES)
            raise IntegrityError(f"{name} in {path} has dtype {entry['dtype']}; accepted: {accepted}")
    return {
        name: np.frombuffer(entry["data"], _STORED_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in stored
    }
