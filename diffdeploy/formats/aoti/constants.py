"""Constants of an AOTInductor package: weights and tables stand in its library byte for byte, numbers in its code.

So a fault in a constant needs no compiler.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats.aoti.backend import MODEL

__all__ = ["read", "read_library", "rewrite_member", "write"]

# Vectorised code holds a number many times over (16 times with AVX-512, measured); more than this are not all the same
# number: zero is there 38,000 times.
_MOST_COPIES = 256
# Steps of float32 away from the exact number. A lambda was found 5 steps away, as the block had computed it.
_ROUNDINGS = 8


def read(directory: Path, expected: Mapping[str, Array]) -> set[str]:
    """Names of the constants that are in the package's library."""
    _, library = read_library(directory / MODEL)
    return {name for name, array in expected.items() if _written(library, array)}


def write(directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
    """Replace constants in the library, and write the package again."""
    path = directory / MODEL
    name_of_library, library = read_library(path)
    places = []
    # All places are found before one is changed, since a new number may be the old one of the next.
    for name, array in changes.items():
        for found in _written(library, expected[name]):
            new = np.ascontiguousarray(array).astype(found.dtype).tobytes()
            places += [(match.start(), new) for match in re.finditer(re.escape(found.tobytes()), library)]
    changed = bytearray(library)
    for start, new in places:
        changed[start : start + len(new)] = new
    rewrite_member(path, name_of_library, bytes(changed))


def read_library(path: Path) -> tuple[str, bytes]:
    """Name and content of the library in a package."""
    with zipfile.ZipFile(path) as package:
        # More than one library would be another kind of package.
        (name,) = (name for name in package.namelist() if name.endswith(".so"))
        return name, package.read(name)


def rewrite_member(path: Path, member: str, content: bytes) -> None:
    """Replace the content of one file in a package."""
    with zipfile.ZipFile(path) as package:
        members = [(info, content if info.filename == member else package.read(info)) for info in package.infolist()]
    with zipfile.ZipFile(path, "w") as package:
        for info, data in members:
            package.writestr(info, data)


def _written(library: bytes, array: Array) -> list[Array]:
    """The array in the dtypes and with the last bit that the library holds it with.

    A number may stand there in both precisions: one that code computes with, one that is handed to a kernel.
    """
    # An array that is there twice may be two weights, and a change must hit one.
    most = _MOST_COPIES if array.ndim == 0 else 1
    found = (
        next((form for form in forms if 0 < library.count(form.tobytes()) <= most), None) for forms in _forms(array)
    )
    return [form for form in found if form is not None]


def _forms(array: Array) -> list[list[Array]]:
    """Forms of which one is looked for, in each list."""
    if array.dtype != np.float64:
        return [[array]]
    if array.ndim:
        return [[np.ascontiguousarray(array.astype(dtype)) for dtype in ("float32", "float16", "bfloat16")]]
    return [[np.asarray(number) for number in _near(np.float32(array))], [array]]


def _near(single: np.float32) -> list[np.float32]:
    """A number in float32 and its neighbours, nearest first: how it was rounded on its way is not known."""
    numbers, below, above = [single], single, single
    for _ in range(_ROUNDINGS):
        below, above = np.nextafter(below, np.float32(-np.inf)), np.nextafter(above, np.float32(np.inf))
        numbers += [below, above]
    return numbers
