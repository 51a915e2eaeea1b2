"""OpenVINO itself, on bundles as they are exported: the sweep of every verification, run by another runtime."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import diffdeploy
from diffdeploy.bundle import open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.exporters import ExportOptions
from diffdeploy.formats import RunOptions
from diffdeploy.verify import verify_bundle
from tests.support.bundles import ENGINE_MODEL, BundleCache

pytestmark = pytest.mark.engines

BY_OPENVINO = RunOptions(runtime="openvino")
SMALL = ExportOptions(max_batch_size=8, max_sequence_length=64, cases=1)


@pytest.mark.parametrize("graph", ["plain", "masked", "cached"])
@pytest.mark.parametrize(("opset", "dtype"), [(18, "float32"), (22, "float32"), (22, "float16")])
def test_blocks_of_products_and_softmax(
    graph: str, opset: int, dtype: str, sample: Checkpoint, bundles: BundleCache
) -> None:
    options = replace(SMALL, graph=graph, opset=opset, dtype=dtype)  # type: ignore[arg-type]
    report = verify_bundle(bundles.bundle(sample, options), cases="full", run_options=BY_OPENVINO)
    assert report.passed, report.worst
    assert report.backend.startswith("OpenVINO 2026.")
    assert not any(part.untried for part in report.coverage)


@pytest.mark.parametrize("graph", ["plain", "cached"])
@pytest.mark.parametrize("opset", [23, 24])
def test_its_attention_loses_nan_and_nothing_else(
    graph: str, opset: int, sample: Checkpoint, bundles: BundleCache
) -> None:
    options = replace(SMALL, graph=graph, opset=opset)  # type: ignore[arg-type]
    report = verify_bundle(bundles.bundle(sample, options), cases="full", run_options=BY_OPENVINO)
    failed = [case.id for case in report.cases if not case.passed]
    assert failed
    assert all(case.endswith(("-nan", "-infinity")) for case in failed)
    assert [check.name for check in report.contract if not check.passed] == ["NaN"]


@pytest.mark.parametrize("opset", [20, 23])
def test_a_model(opset: int, bundles: BundleCache) -> None:
    path = bundles.bundle(read_model(SAMPLE), replace(ENGINE_MODEL, opset=opset))
    report = verify_bundle(path, cases="full", run_options=BY_OPENVINO)
    assert report.passed, report.worst
    assert report.greedy_tokens_checked


def test_a_wrong_artifact_fails(sample: Checkpoint, bundles: BundleCache, tmp_path: Path) -> None:
    right = bundles.bundle(sample, replace(SMALL, opset=22))
    for name in open_bundle(right).manifest.files:
        (tmp_path / name).write_bytes((right / name).read_bytes())
    weight = read_weights(open_bundle(right))["out_proj.weight"]
    model = onnx.load(tmp_path / "model.onnx")
    (held,) = (t for t in model.graph.initializer if t.raw_data in (weight.tobytes(), weight.T.tobytes()))
    held.raw_data = (np.frombuffer(held.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(model, tmp_path / "model.onnx")
    write_manifest(tmp_path, open_bundle(right).manifest)
    report = verify_bundle(tmp_path, cases="quick", run_options=BY_OPENVINO)
    failed = [case.id for case in report.cases if not case.passed]
    assert len(failed) > len(report.cases) // 2, failed


def test_the_command_and_tokens(bundles: BundleCache, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundles.bundle(read_model(SAMPLE), ENGINE_MODEL)
    assert main(["verify", str(path), "--engine", "openvino", "--cases", "quick"]) == 0
    assert "OpenVINO" in capsys.readouterr().out
    prompt = np.array([[100, 101, 102]])
    with diffdeploy.load(path) as ours, diffdeploy.load(path, runtime="openvino", threads=1) as theirs:
        expected = ours.generate(prompt, max_new_tokens=24)
        np.testing.assert_array_equal(theirs.generate(prompt, max_new_tokens=24), expected)
