"""Files of arrays that are cut, foreign, or lie about what they hold."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffdeploy.arrays import read_safetensors
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.files import read_arrays


def npy(header: str) -> bytes:
    padded = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def zipped(content: bytes, name: str = "x.npy") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def objects() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.array([{}], dtype=object))
    return stream.getvalue()


GOOD = io.BytesIO()
np.savez(GOOD, x=np.zeros(100))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        GOOD.getvalue()[:200],
        GOOD.getvalue()[:-40],
        objects(),
        zipped(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000), }")),
        zipped(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }")),
        zipped(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }") + b"\x00"),
        zipped(npy("{'descr': 'nothing', 'fortran_order': False, 'shape': (4,), }")),
        zipped(npy("import os")),
        zipped(npy("(" * 100)),
        zipped(b"text", "x.txt")[:-1],
        bytes(range(256)) * 40,
    ],
    ids=["empty", "start", "cut", "no directory", "objects", "huge", "negative", "short", "dtype", "code", "nested",
         "text", "noise"],
)  # fmt: skip
def test_a_file_that_holds_no_arrays_is_bad_input(content: bytes, tmp_path: Path) -> None:
    for name in ("x.npz", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_arrays(tmp_path / name)


def test_a_dtype_that_no_bundle_has_is_damage(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.uint16)}, tmp_path / "x.safetensors")
    with pytest.raises(IntegrityError, match=r"x in .* has dtype U16; accepted: F64"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["V4", [("a", "f4"), ("b", "f4")]], ids=["raw", "record"])
def test_records_are_no_input_of_run(
    dtype: Any, sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", hidden_states=np.zeros((1, 2, 128), dtype))
    assert main(["run", str(sample_bundle), "-i", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 2
    assert "hidden_states has dtype" in capsys.readouterr().err
