"""The contract of the ONNX file: each check fails on a file that breaks it, and only that one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.verify import verify_bundle

# What cannot be run has none.
PROPERTIES = {"determinism", "batch invariance", "causality"}


def failed_checks(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> set[str]:
    """Change the model, sign the bundle again, verify it and name the checks that fail."""
    manifest = open_bundle(bundle).manifest
    model = onnx.load(bundle / "model.onnx")
    change(model)
    onnx.save(model, bundle / "model.onnx")
    write_manifest(bundle, manifest)
    return {check.name for check in verify_bundle(bundle).contract if not check.passed}


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    tensor: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    return tensor


def fix_the_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def add_a_softmax(model: onnx.ModelProto) -> None:
    last = model.graph.node[-1]
    last.output[0] = "before_softmax"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["before_softmax"], ["output"]))


def add_a_foldable_node(model: onnx.ModelProto) -> None:
    constant = initializer(model, "_frozen_lambda").name
    model.graph.node.insert(0, onnx.helper.make_node("Neg", [constant], ["negative"]))


def leave_an_unused_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "left_over"))


def leak_a_path(model: onnx.ModelProto) -> None:
    model.graph.node[0].doc_string = "/home/someone/model.py"


def name_a_node_after_a_path(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "/home/someone/Shape"


def shift_the_rope_table(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "rotary.sin")
    table = onnx.numpy_helper.to_array(tensor).copy()
    table[200] = table[201]
    tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))


def use_a_weight_of_another_ulp(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "subln.weight")
    gamma = onnx.numpy_helper.to_array(tensor).copy()
    gamma[3] = np.nextafter(gamma[3], np.float32(np.inf))
    tensor.CopyFrom(onnx.numpy_helper.from_array(gamma, tensor.name))


def raise_the_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 24


def import_another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def rename_the_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "result"
    model.graph.output[0].name = "result"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (fix_the_batch, {"interface", *PROPERTIES}),
        (add_a_softmax, {"attention"}),
        (add_a_foldable_node, {"folded"}),
        (leave_an_unused_constant, {"folded"}),
        (leak_a_path, {"traces"}),
        (name_a_node_after_a_path, {"traces"}),
        (shift_the_rope_table, {"rope"}),
        (use_a_weight_of_another_ulp, {"weights"}),
        (raise_the_opset, {"operators"}),
        (import_another_domain, {"operators"}),
        (rename_the_output, {"interface", *PROPERTIES}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_contract_is_named(
    change: Callable[[onnx.ModelProto], None], expected: set[str], bundle_copy: Path
) -> None:
    assert failed_checks(bundle_copy, change) == expected


def test_an_untouched_bundle_passes(bundle_copy: Path) -> None:
    assert failed_checks(bundle_copy, lambda _: None) == set()


def test_a_model_that_does_not_load_is_a_failed_check(bundle_copy: Path) -> None:
    def break_the_types(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Sub").op_type = "And"

    failed = failed_checks(bundle_copy, break_the_types)
    assert {"valid", "loads"} <= failed


def test_wrong_golden_outputs_are_seen(bundle_copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    manifest = open_bundle(bundle_copy).manifest
    path = bundle_copy / "golden.safetensors"
    arrays = load_file(path)
    name = next(name for name in arrays if name.endswith(".output"))
    arrays[name] = arrays[name] + 1e-6
    save_file(arrays, path)
    write_manifest(bundle_copy, manifest)
    report = verify_bundle(bundle_copy)
    assert [check.name for check in report.contract if not check.passed] == ["golden"]
    assert not report.passed
