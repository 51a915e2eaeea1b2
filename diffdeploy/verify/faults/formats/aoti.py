"""Constants of an AOTInductor package: weights and tables stand in its library byte for byte, numbers in its code.

So a fault in a constant needs no compiler.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array

__all__ = ["edit_metadata", "edit_source", "read", "write"]

# Vectorised code holds a number many times over; more than this are not all the same number.
_MOST_COPIES = 256
_ROUNDINGS = 8


def read(directory: Path, expected: Mapping[str, Array]) -> set[str]:
    """Names of the constants that are in the package's library."""
    _, library = _library(directory / "model.pt2")
    return {name for name, array in expected.items() if _written(library, array)}


def write(directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
    """Replace constants in the library, and write the package again."""
    path = directory / "model.pt2"
    name_of_library, library = _library(path)
    places = []
    for name, array in changes.items():
        for found in _written(library, expected[name]):
            new = np.ascontiguousarray(array).astype(found.dtype).tobytes()
            places += [(match.start(), new) for match in re.finditer(re.escape(found.tobytes()), library)]
    changed = bytearray(library)
    for start, new in places:
        changed[start : start + len(new)] = new
    _rewrite(path, name_of_library, bytes(changed))


def _library(path: Path) -> tuple[str, bytes]:
    with zipfile.ZipFile(path) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".so"))
        return name, package.read(name)


def _rewrite(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as package:
        members = [(info, content if info.filename == member else package.read(info)) for info in package.infolist()]
    with zipfile.ZipFile(path, "w") as package:
        for info, data in members:
            package.writestr(info, data)


def _written(library: bytes, array: Array) -> list[Array]:
    """The array in the dtypes and with the last bit that the library holds it with.

    A number may stand there in both precisions: one that code computes with, one that is handed to a kernel.
    """
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


def edit_metadata(directory: Path, changes: Mapping[str, str]) -> None:
    """Change what a package says of itself, in every file that says it."""
    path = directory / "model.pt2"
    with zipfile.ZipFile(path) as package:
        members = [name for name in package.namelist() if name.endswith("_metadata.json")]
        said = {name: {**json.loads(package.read(name)), **changes} for name in members}
    for name, metadata in said.items():
        _rewrite(path, name, json.dumps(metadata).encode())


def edit_source(directory: Path, pattern: bytes, replacement: bytes) -> None:
    """Replace the first match in the source that the package was compiled from."""
    path = directory / "model.pt2"
    with zipfile.ZipFile(path) as package:
        name = next(name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        source = package.read(name)
    _rewrite(path, name, re.sub(pattern, replacement, source, count=1))
