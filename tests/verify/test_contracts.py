"""What a contract must refuse although every number of the artifact is right."""

import shutil
from pathlib import Path

import onnx

from diffdeploy.bundle import Bundle, open_bundle, read_weights
from diffdeploy.verify import artifact_checks
from tests.support.bundles import FormatBundle


def failed(bundle: Bundle) -> dict[str, str]:
    return {check.name: check.detail for check in artifact_checks(bundle, read_weights(bundle)) if not check.passed}


def test_operators_inside_of_local_functions_are_not_hidden(format_bundle: FormatBundle, tmp_path: Path) -> None:
    shutil.copytree(format_bundle("onnx"), tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle")
    model = onnx.load(opened.path / "model.onnx")
    softmax = onnx.helper.make_node("Softmax", ["x"], ["y"])
    opsets = [onnx.helper.make_opsetid("", 23)]
    model.functions.append(onnx.helper.make_function("here", "Attention", ["x"], ["y"], [softmax], opsets))
    onnx.save(model, opened.path / "model.onnx")
    assert "1 local functions" in failed(opened)["operators"]


def test_a_program_must_have_the_declared_ranges(format_bundle: FormatBundle) -> None:
    opened = open_bundle(format_bundle("pt2"))
    assert failed(opened) == {}
    spec = opened.manifest.graph
    axes = {**spec.axes, "sequence_length": spec.axes["sequence_length"].model_copy(update={"max": 99})}
    changed = opened.manifest.model_copy(update={"graph": spec.model_copy(update={"axes": axes})})
    assert "from 1 to 70, declared is 1 to 99" in failed(Bundle(opened.path, changed))["interface"]
