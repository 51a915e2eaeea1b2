"""The external weight files that a model names, checked before onnx or onnxruntime opens any of them.

The model itself contains these names, and a name may lead anywhere. Machines that only run bundles do not have onnx,
which could parse the model, so this module finds the names in the bytes of the file, through the few fields that lead
to them.

Source: the encoding of protocol buffers, and the field numbers in ``onnx.proto`` of onnx 1.23.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.errors import IntegrityError
from diffdeploy.formats.onnx.names import EXTERNAL_DATA, MODEL, is_external_data

if TYPE_CHECKING:
    import onnx

__all__ = ["load_model", "remove_external_data", "require_own_data"]

# Fields whose messages may contain a tensor, by the message that has the field.
_INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
# Wire types of fields: a number, eight bytes, a length with bytes, four bytes.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Maximum length in bytes of a varint: of one that encodes a length or a field tag, and of any other.
_SHORT, _LONG = 5, 10


def load_model(directory: Path, *, weights: bool = True) -> "onnx.ModelProto":
    """Load the model of a bundle.

    Args:
        directory: directory of the bundle.
        weights: true to read weights from their separate files, too.

    Raises:
        IntegrityError: the model reads weights from a file that no export writes.
    """
    import onnx

    require_own_data(directory)
    return onnx.load(directory / MODEL, load_external_data=weights)


def require_own_data(directory: Path) -> None:
    """Check that a model reads weights only from itself and from the files that an export writes next to it.

    Args:
        directory: directory of the bundle.

    Raises:
        IntegrityError: the model names another file.
        ValueError: the file is not a model.
    """
    path = directory / MODEL
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for location in _locations(data):
            if not is_external_data(location):
                raise IntegrityError(
                    f"{path} is not loaded: it reads weights from {location!r}, but an export writes them into the "
                    f"model or into {EXTERNAL_DATA}"
                )


def remove_external_data(directory: Path) -> None:
    """Delete the files of weights of a model that is about to be saved as a single file."""
    for path in [path for path in directory.iterdir() if is_external_data(path.name)]:
        path.unlink()


def _locations(data: mmap.mmap) -> Iterator[str]:
    """File names in all tensors of the model that have external data."""
    pending = [("model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        found = list(_fields(data, start, end))
        if message == "entry":
            # If a field occurs twice, the last one counts.
            entry = {number: data[first:last] for number, first, last in found}
            if entry.get(_KEY) == b"location":
                yield entry.get(_VALUE, b"").decode(errors="replace")
            continue
        inside = _INSIDE[message]
        pending += [(inside[number], first, last) for number, first, last in found if number in inside]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field in a message, if the field holds a sequence of bytes; others are skipped."""
    while start < end:
        tag, start = _varint(data, start, end, _SHORT)
        size, kind = 0, tag % 8
        if kind == _VARINT:
            _, start = _varint(data, start, end, _LONG)
        elif kind == _BYTES:
            size, start = _varint(data, start, end, _SHORT)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"field {tag // 8} has a wire type that ONNX does not use")
        if start + size > end:
            raise ValueError(f"field {tag // 8} ends after the end of its message")
        if kind == _BYTES:
            yield tag // 8, start, start + size
        start += size


def _varint(data: mmap.mmap, start: int, end: int, longest: int) -> tuple[int, int]:
    """Decode a number with seven bits per byte, lowest first; return the number and its end."""
    number = 0
    for count, place in enumerate(range(start, min(end, start + longest))):
        more, bits = divmod(data[place], 0x80)
        number |= bits << (7 * count)
        if not more:
            return number, place + 1
    raise ValueError("a number does not end")
