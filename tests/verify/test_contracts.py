"""What a contract must refuse although every number of the artifact is right."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import ExportedProgram

from diffdeploy.bundle import Bundle, open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import IntegrityError
from diffdeploy.formats.aoti.constants import rewrite_member
from diffdeploy.formats.pt2.backend import load_program
from diffdeploy.formats.pt2.constants import save
from diffdeploy.formats.pt2.faults import _after_output
from diffdeploy.verify import artifact_checks, verify_bundle
from tests.support.bundles import BundleCache, FormatBundle, options_of

Edit = Callable[[onnx.ModelProto], Any]


def failed(bundle: Bundle) -> dict[str, str]:
    return {check.name: check.detail for check in artifact_checks(bundle, read_weights(bundle)) if not check.passed}


def edited(bundle: Path, edit: Edit) -> Bundle:
    """A bundle with another model, and the digest of that."""
    manifest = open_bundle(bundle).manifest
    model = onnx.load(bundle / "model.onnx")
    edit(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(bundle, manifest)
    return open_bundle(bundle)


def behind_the_output(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Nodes from ``before`` to ``output``."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "output":
                node.output[index] = "before"
    model.graph.node.extend(nodes)


def constant(model: onnx.ModelProto, name: str, array: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))


def in_an_if(model: onnx.ModelProto) -> None:
    """A branch that is never taken, with an attention in it."""

    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [value])

    constant(model, "zero", np.int64(0))
    behind_the_output(
        model,
        helper.make_node("Shape", ["hidden_states"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Greater", ["batch", "zero"], ["always"]),
        helper.make_node(
            "If",
            ["always"],
            ["output"],
            then_branch=branch("then", helper.make_node("Identity", ["before"], ["one"])),
            else_branch=branch("else", helper.make_node("Softmax", ["before"], ["other"])),
        ),
    )


def in_a_loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes"]), helper.make_node("Identity", ["state"], ["same"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("same", TensorProto.FLOAT, None),
        ],
    )
    constant(model, "once", np.int64(1))
    behind_the_output(model, helper.make_node("Loop", ["once", "", "before"], ["output"], body=body))


def in_a_function(model: onnx.ModelProto) -> None:
    """A function by the name of an operator of the standard."""
    softmax = helper.make_node("Softmax", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Mul", ["x"], ["y"], [softmax], [helper.make_opsetid("", 23)]))


def through_float16(model: onnx.ModelProto) -> None:
    behind_the_output(
        model,
        helper.make_node("Cast", ["before"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["output"], to=TensorProto.FLOAT),
    )


def like_bfloat16(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("narrow", TensorProto.BFLOAT16, [1], b"\0\0", raw=True))
    behind_the_output(
        model,
        helper.make_node("CastLike", ["before", "narrow"], ["half"]),
        helper.make_node("CastLike", ["half", "hidden_states"], ["output"]),
    )


def in_eight_bits(model: onnx.ModelProto) -> None:
    constant(model, "step", np.float32(0.01))
    behind_the_output(
        model,
        helper.make_node("QuantizeLinear", ["before", "step"], ["narrow"]),
        helper.make_node("DequantizeLinear", ["narrow", "step"], ["output"]),
    )


def attribute_of(operator: str, name: str, value: Any) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == operator)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def written_out(model: onnx.ModelProto) -> None:
    """A softmax over rows of one, which are 1, as a factor."""
    constant(model, "last", np.array([-1], np.int64))
    behind_the_output(
        model,
        helper.make_node("Unsqueeze", ["before", "last"], ["columns"]),
        helper.make_node("Exp", ["columns"], ["exponentials"]),
        helper.make_node("ReduceSum", ["exponentials", "last"], ["sums"]),
        helper.make_node("Div", ["exponentials", "sums"], ["ones"]),
        helper.make_node("Squeeze", ["ones", "last"], ["factor"]),
        helper.make_node("Mul", ["before", "factor"], ["output"]),
    )


def of_node(model: onnx.ModelProto) -> Any:
    return next(node for node in model.graph.node if node.attribute)


def named_axis(model: onnx.ModelProto) -> Any:
    axes = (axis for value in model.graph.value_info for axis in value.type.tensor_type.shape.dim)
    return next(axis for axis in axes if axis.dim_param)


def unknown_field(model: onnx.ModelProto) -> None:
    """A text in a field of a number that no version of onnx has."""
    model.graph.MergeFromString(b"\xfa\x3f\x05/home")


# What is wrong with the model, the check that says so, and what it says.
WRONG: dict[str, tuple[Edit, str, str]] = {
    "if": (in_an_if, "operators", "has g, which no export writes"),
    "loop": (in_a_loop, "operators", "has g, which no export writes"),
    "function": (in_a_function, "operators", "Model has functions, which no export writes"),
    "training": (lambda model: model.training_info.add(), "operators", "Model has training_info"),
    "sparse weight": (
        lambda model: model.graph.sparse_initializer.add().values.CopyFrom(numpy_helper.from_array(np.ones(1), "x")),
        "operators",
        "Graph main_graph has sparse_initializer",
    ),
    "other values": (lambda model: of_node(model).attribute[0].tensors.add(), "operators", "has tensors"),
    "overload": (lambda model: setattr(of_node(model), "overload", "x"), "operators", "has overload"),
    "unknown field": (unknown_field, "operators", "fields that the installed onnx does not know"),
    "two opsets": (
        lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx", 22)),
        "operators",
        "opset 23, 22, but the manifest says 23",
    ),
    "float16": (through_float16, "precision", "half is FLOAT16"),
    "bfloat16": (like_bfloat16, "precision", "half is BFLOAT16"),
    "int8": (in_eight_bits, "precision", "narrow is UINT8"),
    "norm in float16": (
        attribute_of("RMSNormalization", "stash_type", TensorProto.FLOAT16),
        "precision",
        "computes in FLOAT16",
    ),
    "softmax in bfloat16": (
        attribute_of("Attention", "softmax_precision", TensorProto.BFLOAT16),
        "precision",
        "computes in BFLOAT16",
    ),
    "softmax of exp and sum": (written_out, "attention", "1 Softmax or Exp nodes"),
    "epsilon": (attribute_of("RMSNormalization", "epsilon", 1.1e-5), "epsilon", "is 1.1e-05, but should be 1e-05"),
    "note on the model": (lambda model: setattr(model, "doc_string", "x"), "traces", "Model has doc_string"),
    "note on the graph": (lambda model: setattr(model.graph, "doc_string", "x"), "traces", "has doc_string"),
    "note on a node": (lambda model: setattr(of_node(model), "doc_string", "x"), "traces", "Node node_"),
    "note on an attribute": (
        lambda model: setattr(of_node(model).attribute[0], "doc_string", "x"),
        "traces",
        "has doc_string",
    ),
    "note on a weight": (
        lambda model: setattr(model.graph.initializer[0], "doc_string", "x"),
        "traces",
        "Tensor block.",
    ),
    "note on an input": (
        lambda model: setattr(model.graph.input[0], "doc_string", "x"),
        "traces",
        "ValueInfo hidden_states has doc_string",
    ),
    "metadata of the model": (
        lambda model: helper.set_model_props(model, {"a": "b"}),
        "traces",
        "Model has metadata_props",
    ),
    "metadata of a weight": (
        lambda model: model.graph.initializer[0].metadata_props.add(key="a", value="b"),
        "traces",
        "has metadata_props",
    ),
    "path in a text of an attribute": (
        lambda model: of_node(model).attribute.append(helper.make_attribute("note", ["C:\\x"])),
        "traces",
        "looks like a path",
    ),
    "path in the name of an axis": (
        lambda model: setattr(named_axis(model), "dim_param", "/home/x"),
        "traces",
        "'/home/x' looks like a path",
    ),
    "another producer": (
        lambda model: setattr(model, "producer_name", "somebody"),
        "traces",
        "produced by 'somebody', not by pytorch",
    ),
    "another version": (
        lambda model: setattr(model, "producer_version", "1.0"),
        "traces",
        "torch 1.0 wrote it, but the manifest says",
    ),
    "axis of a meaning": (
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "denotation", "DATA_BATCH"),
        "operators",
        "has denotation",
    ),
}


@pytest.fixture
def onnx_copy(format_bundle: FormatBundle, tmp_path: Path) -> Path:
    shutil.copytree(format_bundle("onnx"), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", WRONG)
def test_a_model_holds_what_an_export_writes_and_nothing_else(name: str, onnx_copy: Path) -> None:
    edit, check, message = WRONG[name]
    found = failed(edited(onnx_copy, edit))
    assert message in found[check]


@pytest.mark.parametrize("name", ["if", "loop", "softmax of exp and sum", "another version"])
def test_nothing_but_the_contract_sees_it(name: str, onnx_copy: Path) -> None:
    """Their numbers are right, so that a test of the contract is no test of something else."""
    edited(onnx_copy, WRONG[name][0])
    report = verify_bundle(onnx_copy, cases=3)
    assert all(case.passed for case in report.cases)
    assert not report.passed


def test_an_exponential_more_is_seen_where_a_softmax_is_expected(
    sample: Checkpoint, bundles: BundleCache, tmp_path: Path
) -> None:
    shutil.copytree(bundles.bundle(sample, options_of("onnx", opset=18), verify=False), tmp_path / "bundle")
    assert failed(open_bundle(tmp_path / "bundle")) == {}
    found = failed(edited(tmp_path / "bundle", written_out))
    assert "3 Softmax or Exp nodes; expected 0, 0, 2" in found["attention"]


@pytest.fixture
def pt2_copy(format_bundle: FormatBundle, tmp_path: Path) -> Path:
    shutil.copytree(format_bundle("pt2"), tmp_path / "bundle")
    return tmp_path / "bundle"


def with_program(bundle: Path, edit: Callable[[ExportedProgram], Any]) -> Bundle:
    """A bundle with another program, and the digest of that."""
    manifest, program = open_bundle(bundle).manifest, load_program(bundle)
    edit(program)
    program.graph_module.recompile()
    save(program, bundle)
    write_manifest(bundle, manifest)
    return open_bundle(bundle)


def with_json(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> Bundle:
    """A bundle whose program says something else."""
    manifest = open_bundle(bundle).manifest
    with zipfile.ZipFile(bundle / "model.pt2") as old:
        entries = {name: old.read(name) for name in old.namelist()}
    model = json.loads(entries["model/models/model.json"])
    edit(model)
    entries["model/models/model.json"] = json.dumps(model).encode()
    with zipfile.ZipFile(bundle / "model.pt2", "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)
    write_manifest(bundle, manifest)
    return open_bundle(bundle)


def exp_and_sum(program: ExportedProgram) -> None:
    _after_output(program, torch.ops.aten.exp.default)
    _after_output(program, torch.ops.aten.sum.dim_IntList, [-1], True)


def call_through_float16(program: ExportedProgram) -> None:
    _after_output(program, torch.ops.aten.to.dtype, torch.float16)
    _after_output(program, torch.ops.aten.to.dtype, torch.float32)


def another_epsilon(program: ExportedProgram) -> None:
    norm = next(node for node in program.graph.nodes if "rms_norm" in str(node.target))
    norm.args = (*norm.args[:3], 1.1e-5)


WRONG_PROGRAMS: dict[str, tuple[Callable[[ExportedProgram], Any], str, str]] = {
    "exp": (exp_and_sum, "attention", "1 softmax or exp calls"),
    "softmax": (
        lambda program: _after_output(program, torch.ops.aten._softmax.default, -1, False),
        "attention",
        "1 softmax or exp calls",
    ),
    "float16": (call_through_float16, "precision", "is float16"),
    "epsilon": (another_epsilon, "epsilon", "is 1.1e-05, but should be 1e-05"),
}


@pytest.mark.parametrize("name", WRONG_PROGRAMS)
def test_a_program_calls_what_an_export_does(name: str, pt2_copy: Path) -> None:
    edit, check, message = WRONG_PROGRAMS[name]
    assert message in failed(with_program(pt2_copy, edit))[check]


def metadata_of(model: dict[str, Any]) -> Any:
    return next(node["metadata"] for node in model["graph_module"]["graph"]["nodes"] if node["metadata"])


@pytest.mark.parametrize(
    ("edit", "check", "message"),
    [
        (lambda model: metadata_of(model).update(note="/home/someone"), "traces", "'/home/someone' looks like a path"),
        (lambda model: metadata_of(model).update(stack_trace="File x"), "traces", "a stack trace on"),
        (lambda model: model.update(torch_version="2.0.0"), "traces", "torch 2.0.0 wrote it, but the manifest says 2."),
        (
            lambda model: [
                meta.update(dtype=6)
                for name, meta in model["graph_module"]["graph"]["tensor_values"].items()
                if name == "tensors_0"
            ],
            "interface",
            "hidden_states is float16 with 3 axes, but declared as float32",
        ),
    ],
    ids=["path", "stack trace", "torch", "dtype"],
)
def test_a_program_says_what_an_export_does(
    edit: Callable[[dict[str, Any]], Any], check: str, message: str, pt2_copy: Path
) -> None:
    assert message in failed(with_json(pt2_copy, edit))[check]


class Branches(torch.nn.Module):
    """One attention in a branch, where counts of the calls of a graph would not see it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cond(x.sum() > 0, lambda y: y.softmax(-1), lambda y: y.clone(), (x,)),)


def test_a_program_with_subgraphs_is_refused(pt2_copy: Path) -> None:
    manifest = open_bundle(pt2_copy).manifest
    program = torch.export.export(Branches(), (torch.ones(2, 3, 128),))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # refused before the branches are seen
    save(program, pt2_copy)
    write_manifest(pt2_copy, manifest)
    with pytest.raises(IntegrityError, match=r"its graph has (as_graph|target 'torch\.ops\.higher_order\.cond')"):
        failed(open_bundle(pt2_copy))


def test_a_program_must_have_the_declared_ranges(format_bundle: FormatBundle) -> None:
    opened = open_bundle(format_bundle("pt2"))
    assert failed(opened) == {}
    spec = opened.manifest.graph
    axes = {**spec.axes, "sequence_length": spec.axes["sequence_length"].model_copy(update={"max": 99})}
    changed = opened.manifest.model_copy(update={"graph": spec.model_copy(update={"axes": axes})})
    assert "from 1 to 70, but declared as 1 to 99" in failed(Bundle(opened.path, changed))["interface"]


@pytest.mark.parametrize(
    ("member", "edit", "check", "message"),
    [
        ("kernel.cpp", lambda source: source + b"auto x = std::exp(y);", "attention", "1 exp calls in the source"),
        ("kernel.cpp", lambda source: source + b"auto x = tmp3.exp_u20();", "attention", "1 exp calls in the source"),
        ("wrapper.cpp", lambda source: source + b"aoti_torch_cpu__softmax(x, 1);", "attention", "1 exp calls"),
        (
            "wrapper_metadata.json",
            lambda said: json.dumps({**json.loads(said), "torch": "2.0.0"}).encode(),
            "traces",
            "torch 2.0.0 wrote it",
        ),
    ],
    ids=["exp", "vector", "softmax", "torch"],
)
def test_the_source_of_a_package_is_read(
    member: str,
    edit: Callable[[bytes], bytes],
    check: str,
    message: str,
    format_bundle: FormatBundle,
    tmp_path: Path,
) -> None:
    shutil.copytree(format_bundle("aoti"), tmp_path / "bundle")
    assert failed(open_bundle(tmp_path / "bundle")) == {}
    package = tmp_path / "bundle" / "model.pt2"
    with zipfile.ZipFile(package) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(member))
        content = opened.read(name)
    # A sigmoid is no softmax.
    rewrite_member(package, name, edit(content + (b"1 + std::exp(-x); 1 + x.neg().exp();" if "cpp" in name else b"")))
    manifest = open_bundle(format_bundle("aoti")).manifest
    write_manifest(tmp_path / "bundle", manifest)
    assert message in failed(open_bundle(tmp_path / "bundle"))[check]
