"""The AOTInductor package of a bundle, run from C++ by the program in ``examples``."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.verify.oracle import oracle
from tests.support.bundles import FormatBundle
from tests.support.paths import ROOT

# The compiler reads all headers of torch, which takes it most of a minute.
pytestmark = pytest.mark.slow

SOURCE = ROOT / "examples" / "cpp" / "run_aoti.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as its first comment says."""
    target, torch_folder = tmp_path_factory.mktemp("cpp") / "run_aoti", Path(torch.__path__[0])
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler is not None
    include, lib = torch_folder / "include", torch_folder / "lib"
    headers = ["-I", str(include), "-I", str(include / "torch/csrc/api/include")]
    libraries = ["-L", str(lib), f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-std=c++20", "-O1", str(SOURCE), "-o", str(target), *headers, *libraries]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 65)], ids=["B1-S1", "B3-S65"])
def test_a_package_runs_from_cpp(
    batch: int, length: int, program: Path, format_bundle: FormatBundle, sample: Checkpoint
) -> None:
    bundle = format_bundle("aoti")
    x = np.random.default_rng(0).standard_normal((batch, length, 128), dtype=np.float32)
    sizes = [str(size) for size in x.shape]
    done = subprocess.run([program, bundle / "model.pt2", *sizes], input=x.tobytes(), capture_output=True, check=True)
    output = np.frombuffer(done.stdout, np.float32).reshape(x.shape)
    weights = {name: tensor.double().numpy() for name, tensor in sample.weights.items()}
    expected = oracle(sample.config, weights, {"hidden_states": x})["output"]
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
    digest = open_bundle(bundle).manifest.files["weights.safetensors"].sha256
    assert f"weights {digest}" in done.stderr.decode()


@pytest.mark.gpu
def test_a_package_for_cuda_runs_from_cpp(program: Path, sample: Checkpoint, tmp_path: Path) -> None:
    """In half precision on a device of compute capability 9 its attention is `fused`, without this project's code."""
    options = ExportOptions(format="aoti", dtype="float16", device="cuda", max_sequence_length=256, cases="quick")
    bundle = export_bundle(sample, tmp_path / "out", options).path
    x = np.random.default_rng(0).standard_normal((3, 65, 128)).astype(np.float16)
    arguments: list[str | Path] = [program, bundle / "model.pt2", "3", "65", "128", "float16", "cuda"]
    done = subprocess.run(arguments, input=x.tobytes(), capture_output=True, check=True)
    output = np.frombuffer(done.stdout, np.float16).reshape(x.shape)
    weights = {name: tensor.double().numpy() for name, tensor in sample.weights.items()}
    expected = oracle(sample.config, weights, {"hidden_states": x})["output"]
    assert np.abs(output - expected).max() < 64 * np.finfo(np.float16).eps * np.abs(expected).max()


def test_too_few_numbers_are_refused(program: Path, format_bundle: FormatBundle) -> None:
    arguments: list[str | Path] = [program, format_bundle("aoti") / "model.pt2", "1", "1", "128"]
    done = subprocess.run(arguments, input=b"1234", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr == b"standard input holds fewer than 512 bytes\n"
