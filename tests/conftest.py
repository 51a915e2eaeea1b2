"""What tests of many rooms ask for: the sample, and bundles that are exported once."""

import os
from pathlib import Path

# Before torch is imported, and for the processes that tests start: waking a second thread costs more than these small
# blocks do, and `make test` has a process for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Exports that tests make are remembered beside the bundles that they share, not in the user's own directory.
os.environ["XDG_STATE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "state")

import gc
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.exporters import ExportOptions, export_bundle
from tests.support.bundles import BundleCache, FormatBundle, cache_folder, options_of

# Before triton is imported: without a device its kernels run in its interpreter.
if not torch.cuda.is_available() and find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_report_header() -> list[str]:
    """What a run tries and what it leaves out, in its own words, for whoever reads its log."""
    named = {Requirement(text).name for text in requires("diffdeploy") or ()} - {"diffdeploy"}
    found = {name: _version(name) for name in sorted(named)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device, so only the CPU is tried"
    return [
        "versions: " + ", ".join(f"{name} {text}" for name, text in found.items() if text),
        "not tried, not installed: " + ", ".join(name for name, text in found.items() if not text),
        f"torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}; {device}",
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Fixtures that take seconds, once in a module or, the last, once in a process: tests that share one go to one worker.
OF_A_MODULE = {"llama", "model", "model_bundle", "pristine", "program", "sample_model", "saved", "wheel"}
OF_A_PROCESS = "llama_pair"
# Triton's interpreter makes numbers of arrays with one element, and computes with infinities.
WARNINGS_OF_TRITON = ("Conversion of an array:DeprecationWarning", "invalid value encountered:RuntimeWarning")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if OF_A_PROCESS in names or names & OF_A_MODULE:
            item.add_marker(pytest.mark.xdist_group(OF_A_PROCESS if OF_A_PROCESS in names else item.path.stem))
        if "triton" in item.keywords:
            for warning in WARNINGS_OF_TRITON:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{warning}"))
    for marker, reason in (("gpu", _why_no_gpu()), ("triton", _why_no_triton()), ("genai", _why_no_genai())):
        for item in items:
            if reason is not None and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays: the modules of torch and transformers, and thousands of tests."""
    gc.collect()
    gc.freeze()


def _why_no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device that torch can use"


def _why_no_triton() -> str | None:
    """Why no kernel of Triton runs here, neither on a device nor in its interpreter."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed"
    if not torch.cuda.is_available() and Version(np.__version__) >= Version("2.4"):
        return "needs numpy before 2.4 for Triton's interpreter, which makes numbers of arrays with one element"
    return None


def _why_no_genai() -> str | None:
    """Why onnxruntime-genai cannot be installed beside this onnxruntime, as in `make test-oldest`."""
    # Environments of other engines may have no onnxruntime at all.
    found = _version("onnxruntime")
    return None if found is not None and Version(found) >= Version("1.31") else "needs onnxruntime 1.31 or newer"


@pytest.fixture(scope="session")
def bundles(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BundleCache]:
    """Where tests that need a bundle, and not an export, have it from."""
    cache = BundleCache(cache_folder(pytestconfig, tmp_path_factory))
    yield cache
    assert cache.changed() == [], "a test changed a bundle that others share; it must copy it first"


@pytest.fixture(scope="session")
def sample() -> Checkpoint:
    return read_checkpoint(SAMPLE, CheckpointOptions(layer=1))


@pytest.fixture(scope="session")
def sample_bundle(sample: Checkpoint, bundles: BundleCache) -> Path:
    """Layer 1 of the sample, verified. Shared: copy before changing."""
    return bundles.bundle(sample, ExportOptions(max_sequence_length=256, cases="quick"))


@pytest.fixture(scope="session")
def format_bundle(sample: Checkpoint, bundles: BundleCache) -> FormatBundle:
    """A plain, verified bundle for each of `CPU_FORMATS`, made when first asked for. Shared: copy before changing."""
    return lambda name: bundles.bundle(sample, options_of(name))


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tied DiffLlama as a verified ONNX bundle, beside its checkpoint, and the model of transformers."""
    from tests.checkpoints.test_whole_models import diffllama

    folder = tmp_path_factory.mktemp("llama")
    model, _, _ = diffllama(folder / "checkpoint", tie_word_embeddings=True, eos_token_id=7)
    options = ExportOptions(graph="model", max_batch_size=6, max_sequence_length=48, cases="quick")
    export_bundle(read_model(folder / "checkpoint"), folder / "bundle", options)
    return folder / "bundle", model


@pytest.fixture
def bundle_copy(sample_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(sample_bundle, copy)
    return copy
