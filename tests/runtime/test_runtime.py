"""The one interface of all formats: what it takes, gives and refuses, from how many threads and for how long."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from packaging.version import Version

from diffdeploy import load
from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.graphs import DType
from diffdeploy.runtime.machine import differences
from diffdeploy.verify.oracle import oracle
from tests.support.bundles import CPU_FORMATS, FormatBundle
from tests.support.pairwise import rest_is_slow
from tests.support.paths import ROOT

every_format = pytest.mark.parametrize("name", CPU_FORMATS)


def states(batch: int = 2, length: int = 5, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((batch, length, 128), dtype=np.float32)


def exact(sample: Checkpoint, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = {name: tensor.double().numpy() for name, tensor in sample.weights.items()}
    return oracle(sample.config, weights, {"hidden_states": x})["output"]


@every_format
def test_torch_and_numpy_in_and_out(name: str, format_bundle: FormatBundle, sample: Checkpoint) -> None:
    x = states()
    with load(format_bundle(name)) as runtime:
        runtime.warmup()
        array, tensor = runtime(hidden_states=x)["output"], runtime(hidden_states=torch.from_numpy(x))["output"]
        assert isinstance(array, np.ndarray)
        assert isinstance(tensor, torch.Tensor)
        assert not tensor.is_inference()
        np.testing.assert_array_equal(array, tensor.numpy())
        np.testing.assert_allclose(array, exact(sample, x), rtol=0, atol=1e-5)
        strided = np.asfortranarray(x)
        strided.flags.writeable = False
        np.testing.assert_allclose(runtime(hidden_states=strided)["output"], array, rtol=0, atol=1e-6)
        transposed = torch.from_numpy(x).transpose(1, 2).contiguous().transpose(1, 2)
        np.testing.assert_allclose(runtime(hidden_states=transposed)["output"].numpy(), array, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="is closed; load the bundle again"):
        runtime(hidden_states=x)


@every_format
def test_eight_threads_give_the_bits_of_one(name: str, format_bundle: FormatBundle) -> None:
    inputs = [states(batch, length, seed) for seed, (batch, length) in enumerate([(1, 1), (1, 33), (2, 7), (4, 16)])]
    with load(format_bundle(name), threads=1) as runtime:
        alone = [runtime(hidden_states=x)["output"] for x in inputs]

        def calls(thread: int) -> int:
            wrong = 0
            for number in range(100):
                case = (thread + number) % len(inputs)
                wrong += runtime(hidden_states=inputs[case])["output"].tobytes() != alone[case].tobytes()
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(calls, range(8))) == [0] * 8


MEMORY = """
import sys, numpy, diffdeploy
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

runtime = diffdeploy.load(sys.argv[1], threads=1)
x = numpy.ones((1, 16, 128), numpy.float32)
for _ in range(1000):
    runtime(hidden_states=x)
before = resident()
for _ in range(5000):
    runtime(hidden_states=x)
print(resident() - before)
"""


@pytest.mark.parametrize("name", rest_is_slow(CPU_FORMATS))
def test_memory_does_not_grow(name: str, format_bundle: FormatBundle) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(format_bundle(name))], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**20


WRONG_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"x": states()}, r"inputs are \['x'\]; accepted: \['hidden_states'\]"),
    ({"hidden_states": [1.0]}, "hidden_states is a list; accepted: a torch tensor or a numpy array"),
    ({"hidden_states": states().astype(np.float64)}, "has dtype float64; accepted: float32"),
    ({"hidden_states": torch.zeros(2, 3, 128, dtype=torch.bfloat16)}, "has dtype bfloat16; accepted: float32"),
    ({"hidden_states": states()[0]}, "has shape"),
    ({"hidden_states": states()[..., :64]}, "has shape"),
    ({"hidden_states": states(5, 1)}, "batch_size of hidden_states is 5; accepted: 1 to 4"),
    ({"hidden_states": states(1, 71)}, "sequence_length of hidden_states is 71; accepted: 1 to 70"),
    ({"hidden_states": states(1, 0)}, "sequence_length of hidden_states is 0; accepted: 1 to 70"),
]


@every_format
def test_wrong_inputs_are_refused(name: str, format_bundle: FormatBundle) -> None:
    with load(format_bundle(name)) as runtime:
        for changes, message in WRONG_INPUTS:
            with pytest.raises(InputError, match=message):
                runtime(**changes)


def test_warmup_of_given_sizes(format_bundle: FormatBundle) -> None:
    with load(format_bundle("pt2")) as runtime:
        runtime.warmup(batch_size=4, sequence_length=70)
        with pytest.raises(InputError, match="batch_size of hidden_states is 9"):
            runtime.warmup(batch_size=9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, InputError, "device is 'tpu'; accepted: cpu, cuda or cuda:N"),
        ({"threads": 0}, InputError, "threads is 0; accepted: 1 or more"),
        ({"recompile": True}, InputError, "format pt2 cannot be recompiled"),
        ({"runtime": "reference"}, InputError, "which this bundle does not have"),
    ],
    ids=["device", "threads", "recompile", "reference"],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, format_bundle: FormatBundle
) -> None:
    with pytest.raises(error, match=message):
        load(format_bundle("pt2"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_machine_without_gpu_says_so(format_bundle: FormatBundle) -> None:
    with pytest.raises(UnavailableError, match="needs a GPU that torch"):
        load(format_bundle("pt2"), device="cuda")
    with pytest.raises(InputError, match="this aoti bundle was made for cpu"):
        load(format_bundle("aoti"), device="cuda")


@pytest.mark.parametrize("name", ["pt2", "aoti", "compile"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.slow
def test_half_precision_compiles(name: str, dtype: DType, sample: Checkpoint, tmp_path: Path) -> None:
    check_half_precision(name, dtype, sample, tmp_path)


def test_bfloat16(sample: Checkpoint, tmp_path: Path) -> None:
    check_half_precision("pt2", "bfloat16", sample, tmp_path, longest=12)


def check_half_precision(name: str, dtype: DType, sample: Checkpoint, tmp_path: Path, *, longest: int = 70) -> None:
    options = ExportOptions(format=name, dtype=dtype, max_batch_size=4, max_sequence_length=longest, cases="quick")
    done = export_bundle(sample, tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed
    x = states().astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    with load(tmp_path / "out") as runtime:
        output = runtime(hidden_states=x)["output"]
        same = runtime(hidden_states=torch.from_numpy(states()).to(getattr(torch, dtype)))["output"]
    assert output.dtype == x.dtype
    assert same.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(same.float().numpy(), output.astype(np.float32))


def test_bfloat16_onnx_by_the_reference_runtime(sample: Checkpoint, tmp_path: Path) -> None:
    options = ExportOptions(dtype="bfloat16", max_batch_size=2, max_sequence_length=16)
    with pytest.raises(UnavailableError, match="onnxruntime has no bfloat16 attention on cpu"):
        export_bundle(sample, tmp_path / "out", options)
    by_reference = replace(options, runtime="reference")
    if Version(version("onnx")) < Version("1.23"):
        with pytest.raises(UnavailableError, match="cannot multiply matrices in bfloat16"):
            export_bundle(sample, tmp_path / "out", by_reference)
        return
    done = export_bundle(sample, tmp_path / "out", by_reference)
    assert done.report is not None
    assert done.report.passed
    assert done.report.backend.startswith("onnx.reference")


WARM = """
import json, os, sys, time
import torch
import diffdeploy
runtime = diffdeploy.load(sys.argv[1], trust=True)
import torch._inductor.codecache, torch._inductor.utils
y = runtime(hidden_states=torch.ones(2, 5, 128))["output"]
print(json.dumps({"sum": float(y.double().sum()), "cached": sorted(os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]))}))
"""


def test_a_warm_start_compiles_nothing(format_bundle: FormatBundle, tmp_path: Path) -> None:
    """No compiler is there to be called, and nothing is put into inductor's cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WARM, str(format_bundle("compile"))],
        env={"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(cache), **python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cached"] == []
    with load(format_bundle("onnx")) as runtime:
        expected = runtime(hidden_states=np.ones((2, 5, 128), np.float32))["output"]
    assert found["sum"] == pytest.approx(float(expected.astype(np.float64).sum()), abs=1e-2)


def python_path() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


def test_bundles_of_another_machine_are_refused(format_bundle: FormatBundle, tmp_path: Path) -> None:
    manifest = open_bundle(format_bundle("compile")).manifest
    assert set(manifest.made_for) == {"torch", "python", "platform", "isa"}
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(format_bundle("compile")), str(copy)], check=True)
    for change, message in (
        (
            {"torch": "1.0"},
            f"compiled for torch 1.0, but this machine has {re.escape(torch.__version__)}; --recompile compiles it",
        ),
        ({"python": "2.7"}, r"compiled for python 2.7, but this machine has 3\."),
        ({"isa": f"{manifest.made_for['isa']} avx99"}, "compiled for a processor with avx99, which this one lacks"),
    ):
        write_manifest(copy, manifest.model_copy(update={"made_for": {**manifest.made_for, **change}}))
        with pytest.raises(UnavailableError, match=message):
            load(copy)
    x = torch.from_numpy(states())
    with load(copy, recompile=True) as afresh, load(format_bundle("compile")) as warm:
        assert "compiled afresh" in afresh.description
        torch.testing.assert_close(
            afresh(hidden_states=x)["output"], warm(hidden_states=x)["output"], rtol=0, atol=1e-5
        )


def test_a_gpu_is_named() -> None:
    made_for = {"torch": "2.13.0", "gpu": "NVIDIA H200, compute capability 9.0"}
    assert differences(made_for, dict(made_for)) == []
    assert differences(made_for, {"torch": "2.13.0"}) == [
        "gpu NVIDIA H200, compute capability 9.0, but this machine has none"
    ]


@pytest.mark.slow
def test_a_missing_kernel_is_compiled(format_bundle: FormatBundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(format_bundle("compile")), str(copy)], check=True)
    kernels = sorted((copy / "kernels").iterdir())
    assert kernels
    kernels[0].unlink()
    write_manifest(copy, open_bundle(format_bundle("compile")).manifest)
    x = states()
    with load(copy, trust=True) as patched, load(format_bundle("compile")) as whole:
        np.testing.assert_array_equal(patched(hidden_states=x)["output"], whole(hidden_states=x)["output"])
