"""Arrays between numpy, torch and safetensors; bfloat16 included, which numpy knows through ml_dtypes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # numpy knows the name bfloat16 once this is imported
import numpy as np

from diffdeploy.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Array", "ArrayView", "epsilon", "read_safetensors", "smallest_normal", "to_array", "to_tensor"]

Array = np.ndarray[Any, np.dtype[Any]]

# By the names of the safetensors format.
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
    """The smallest positive number of a floating dtype that has its full precision."""
    return float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]


def to_tensor(array: Array) -> "Tensor":
    """The array as a tensor on the CPU that shares its memory; a copy where the array may not be written to."""
    import torch

    # torch warns of memory that it may not write to, and refuses negative strides.
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        # Neither library knows the other's bfloat16, so its bits cross as int16.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: "Tensor") -> Array:
    """The tensor as an array; it shares the memory of a tensor on the CPU."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.contiguous().view(torch.int16).numpy()
        return bits.view("bfloat16")
    array: Array = tensor.numpy()
    return array


class ArrayView(Mapping[str, Array]):
    """Tensors as arrays, each made when it is asked for: of weights that are read lazily, none is held.

    Args:
        tensors: by name.
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
    """All arrays of a file.

    Raises:
        IntegrityError: not a safetensors file, or one that cannot be read.
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
