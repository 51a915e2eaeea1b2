"""Digests of files, and named arrays in the .safetensors and .npz files that users provide and receive."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.errors import InputError, UnavailableError

__all__ = ["check_target", "check_writable", "file_sha256", "read_arrays", "write_arrays", "write_whole"]

_SUFFIXES = (".safetensors", ".npz")


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 digest of a file, the one digest that ties checkpoints, bundles and artifacts together."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'!r}; accepted: .safetensors or .npz")


def check_target(path: Path, *, force: bool = False) -> None:
    """Check that a file can be written, before starting the work that produces its content.

    Raises:
        InputError: the suffix is not accepted, the file exists, or its folder does not.
    """
    _check_suffix(path)
    check_writable(path)
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another file, or --force to replace it")


def check_writable(path: Path) -> None:
    """Check that a file can be written or replaced, before starting the work whose result it will hold.

    Raises:
        InputError: the folder of the file does not exist or is not writable, or the path is itself a folder.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written: {path.parent} is not writable")


def read_arrays(path: Path) -> dict[str, Array]:
    """Read all arrays of a file, by name.

    Raises:
        InputError: the file does not exist, its suffix is not accepted, or its content does not match the suffix.
    """
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        # A pickle inside an .npz file could run code.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # numpy, zlib and zipfile raise many error types for truncated, foreign or forged files
        raise InputError(f"{path} cannot be read as {path.suffix}; it may be truncated") from error


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write all arrays into one file, which appears complete or not at all.

    Raises:
        InputError: the file type cannot store one of the dtypes.
        UnavailableError: the file cannot be written.
    """
    import safetensors.numpy

    if path.suffix == ".safetensors":
        # The file writer of safetensors hides the reason when a disk is full.
        data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    else:
        if any(array.dtype.name == "bfloat16" for array in arrays.values()):
            raise InputError(f"{path} is .npz, which cannot store bfloat16; give a .safetensors file")
        stream = io.BytesIO()
        # numpy 2.0 and 2.1 would store allow_pickle=False as another array; the arrays hold numbers, not objects.
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        data = stream.getvalue()
    write_whole(path, data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all.

    Raises:
        UnavailableError: the file cannot be written.
    """
    # A sibling of the target, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
