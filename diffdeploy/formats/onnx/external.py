"""Which other files a model reads its weights from, seen before onnx or onnxruntime opens one.

A model names them itself, and a name may lead anywhere. Machines that only run bundles have no onnx to read it with, so
the few fields that lead to a name are followed here through the bytes of the file.

Source: the encoding of protocol buffers, and the numbers of fields in ``onnx.proto`` of onnx 1.23.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.errors import IntegrityError
from diffdeploy.formats.onnx.names import EXTERNAL_DATA, MODEL

if TYPE_CHECKING:
    import onnx

__all__ = ["load_model", "require_own_data"]

# Fields that hold messages in which a tensor may be, by the message that they are fields of.
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
# Kinds of fields: a number, eight bytes, bytes of a given length, four bytes.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Bytes of a number that is a length or a field, and of any other.
_SHORT, _LONG = 5, 10


def load_model(directory: Path, *, weights: bool = True) -> "onnx.ModelProto":
    """The model of a bundle.

    Args:
        directory: of the bundle.
        weights: whether weights in a file of their own are read, too.

    Raises:
        IntegrityError: it reads weights from a file that no export writes.
    """
    import onnx

    require_own_data(directory)
    return onnx.load(directory / MODEL, load_external_data=weights)


def require_own_data(directory: Path) -> None:
    """See that a model reads weights from itself and from the one file that an export writes beside it.

    Args:
        directory: of the bundle.

    Raises:
        IntegrityError: it names another file.
        ValueError: the file is no model.
    """
    path = directory / MODEL
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for location in _locations(data):
            if location != EXTERNAL_DATA:
                raise IntegrityError(
                    f"{path} is not loaded: it reads weights from {location!r}, and an export writes them into the "
                    f"model or into {EXTERNAL_DATA}"
                )


def _locations(data: mmap.mmap) -> Iterator[str]:
    """Names of the files that tensors anywhere in the model are in."""
    pending = [("model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        found = list(_fields(data, start, end))
        if message == "entry":
            # Of a field that is there twice the last one counts.
            entry = {number: data[first:last] for number, first, last in found}
            if entry.get(_KEY) == b"location":
                yield entry.get(_VALUE, b"").decode(errors="replace")
            continue
        inside = _INSIDE[message]
        pending += [(inside[number], first, last) for number, first, last in found if number in inside]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Numbers of the fields of a message that are bytes, and where those begin and end."""
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
            raise ValueError(f"field {tag // 8} is of no kind that ONNX has")
        if start + size > end:
            raise ValueError(f"field {tag // 8} ends behind the message that it is in")
        if kind == _BYTES:
            yield tag // 8, start, start + size
        start += size


def _varint(data: mmap.mmap, start: int, end: int, longest: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    number = 0
    for count, place in enumerate(range(start, min(end, start + longest))):
        more, bits = divmod(data[place], 0x80)
        number |= bits << (7 * count)
        if not more:
            return number, place + 1
    raise ValueError("a number has no end")
