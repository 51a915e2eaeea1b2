"""Constants of an AOTInductor package: its library holds weights and tables byte for byte, and numbers in its code.

Faults can therefore be introduced into constants without a compiler.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.formats.aoti.backend import MODEL

__all__ = ["read", "read_library", "rewrite_member", "write"]

# Maximum number of copies of one constant: vectorised code repeats a number (16 times with AVX-512, measured). More
# matches than this cannot all be the same constant: zero occurs 38,000 times.
_MOST_COPIES = 256
# Maximum distance from the exact number in float32 steps (ULPs). One lambda that a block had computed was 5 steps off.
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
    # All places are found before any is changed, since the new value of a constant may be the old value of the next.
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
    """Forms of an array, with their dtype and exact bits, that the library contains.

    A number may occur in both precisions: one is used in the code, and the other is passed to a kernel.
    """
    # An array that occurs twice may be two weights, but a change must affect only one of them.
    most = _MOST_COPIES if array.ndim == 0 else 1
    found = (
        next((form for form in forms if 0 < library.count(form.tobytes()) <= most), None) for forms in _forms(array)
    )
    return [form for form in found if form is not None]


def _forms(array: Array) -> list[list[Array]]:
    """Lists of forms of an array; in each list, the first form that the library contains counts."""
    if array.dtype != np.float64:
        return [[array]]
    if array.ndim:
        return [[np.ascontiguousarray(array.astype(dtype)) for dtype in ("float32", "float16", "bfloat16")]]
    return [[np.asarray(number) for number in _near(np.float32(array))], [array]]


def _near(single: np.float32) -> list[np.float32]:
    """A number in float32 and its neighbours, nearest first, since its intermediate roundings are unknown."""
    numbers, below, above = [single], single, single
    for _ in range(_ROUNDINGS):
        below, above = np.nextafter(below, np.float32(-np.inf)), np.nextafter(above, np.float32(np.inf))
        numbers += [below, above]
    return numbers
