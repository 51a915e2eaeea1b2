"""The process that runs an artifact: the frames that it exchanges with the verification, and its memory."""

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from diffdeploy.arrays import Array
from diffdeploy.bundle import open_bundle
from diffdeploy.formats import RunOptions
from diffdeploy.graphs import zero_inputs
from diffdeploy.verify.worker import ArtifactProcess, _receive, _send
from tests.support.memory import resident_kib

ARRAYS: dict[str, Array] = {
    "strided": np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2].swapaxes(0, 2),
    "bfloat16": np.array([1.5, np.nan], ml_dtypes.bfloat16),
    "mask": np.array([[True, False]]),
    "empty": np.zeros((2, 0, 4), np.float16),
    "number": np.array(7, np.int64),
}


def frame() -> bytes:
    stream = io.BytesIO()
    _send(stream, {"decode": 3}, ARRAYS)
    return stream.getvalue()


def test_arrays_arrive_as_they_were_sent_and_can_be_written() -> None:
    received = _receive(io.BytesIO(frame()))
    assert received is not None
    header, arrays = received
    assert header["decode"] == 3
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype
        assert array.flags.writeable
        assert array.shape == ARRAYS[name].shape
        assert array.tobytes() == ARRAYS[name].tobytes()


@pytest.mark.parametrize("missing", [1, 8, 50])
def test_a_process_that_ends_in_the_middle_of_an_answer_gives_none(missing: int) -> None:
    assert _receive(io.BytesIO(frame()[:-missing])) is None
    assert _receive(io.BytesIO(b"")) is None


def test_the_memory_of_a_large_answer_is_returned_before_the_next(sample_bundle: Path) -> None:
    spec = open_bundle(sample_bundle).manifest.graph
    large = zero_inputs(spec, **{name: bounds.max for name, bounds in spec.axes.items()})
    with ArtifactProcess(sample_bundle, RunOptions()) as artifact:
        process = artifact._process._process
        artifact.run(zero_inputs(spec))
        before = resident_kib(process)
        artifact.run(large)
        peak = resident_kib(process, peak=True)
        artifact.run(zero_inputs(spec))
        after = resident_kib(process)
    assert peak > before + 40 * 1024
    assert after < before + 20 * 1024
