"""Bundles that many tests look at, made once."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.exporters import ExportOptions, export_bundle
from tests.support.bundles import FormatBundle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device that torch can use"))


@pytest.fixture(scope="session")
def sample() -> Checkpoint:
    return read_checkpoint(SAMPLE, CheckpointOptions(layer=1))


@pytest.fixture(scope="session")
def sample_bundle(sample: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 of the sample, verified. Shared: copy before changing."""
    output = tmp_path_factory.mktemp("sample") / "bundle"
    return export_bundle(sample, output, ExportOptions(max_sequence_length=256)).path


@pytest.fixture(scope="session")
def format_bundle(sample: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> FormatBundle:
    """A plain, verified bundle for each of `CPU_FORMATS`, made when first asked for. Shared: copy before changing."""
    folder = tmp_path_factory.mktemp("formats")

    @cache
    def make(name: str) -> Path:
        options = ExportOptions(format=name, max_batch_size=4, max_sequence_length=70)
        if name == "onnx-ort":
            options = replace(options, format="onnx", onnx_flavor="ort")
        return export_bundle(sample, folder / name, options).path

    return make


@pytest.fixture
def bundle_copy(sample_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(sample_bundle, copy)
    return copy
