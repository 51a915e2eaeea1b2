"""The contract of an exported program: two attentions, the declared interface, bit-identical weights."""

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array, to_array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import (
    declared_facts,
    lambda_constant,
    make_check,
    norm_epsilons,
    other_torch,
    rope_constants,
    weights_bit_for_bit,
)
from diffdeploy.formats.pt2.backend import MODEL, load_program
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

__all__ = ["checks", "facts"]

# Operators of a softmax, fused or decomposed; lambda is folded, and a sigmoid is a separate operator.
_EXPONENTIALS = ("softmax", "_softmax", "exp")
# Additional dtypes: those of sums, of sizes and positions, and of masks.
_ELSE = ("float32", "int64", "int32", "bool")


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    # Read from the archive, since loading the program takes a second.
    nodes = _model(bundle)["graph_module"]["graph"]["nodes"]
    return declared_facts(bundle, _counts(node["target"] for node in nodes)[0])


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    program, manifest = load_program(bundle.path), bundle.manifest
    tensors = {**program.state_dict, **program.constants}
    constants = {name: to_array(tensor) for name, tensor in tensors.items() if hasattr(tensor, "detach")}
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found = _counts(str(node.target) for node in calls)
    expected = 2 * len(manifest.config.blocks)
    said = f"{found[0]} scaled_dot_product_attention and {found[1]} softmax or exp calls"
    return [
        make_check("attention", [] if found == (expected, 0) else [f"{said}; expected {expected} and 0"], said),
        make_check(
            "interface", _interface(program, manifest.graph.of_artifact()), "dtypes, sizes and ranges as declared"
        ),
        _precision(calls, constants, manifest.graph.dtype),
        norm_epsilons([_epsilon(node) for node in calls if "rms_norm" in str(node.target)], manifest),
        weights_bit_for_bit(constants, weights),
        lambda_constant(constants, manifest, weights),
        rope_constants(constants, manifest),
        _no_traces(program, _model(bundle), manifest),
    ]


def _model(bundle: Bundle) -> Any:
    """The program as JSON."""
    with zipfile.ZipFile(bundle.path / MODEL) as archive:
        return json.loads(archive.read(next(name for name in archive.namelist() if name.endswith("models/model.json"))))


def _counts(targets: Iterable[str]) -> tuple[int, int]:
    """Counts of fused attentions, and of softmaxes from decomposed attentions."""
    # Counted without their overloads, and without the prefix that the archive adds.
    names = [target.split(".")[-2] for target in targets if "." in target]
    fused = sum("scaled_dot_product" in name for name in names)
    return fused, sum(name in _EXPONENTIALS for name in names)


def _interface(program: "ExportedProgram", spec: GraphSpec) -> list[str]:
    """Check that each axis of each input is the declared size, or a symbol with the declared range."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    problems = []
    for tensors, names in (
        (spec.inputs, program.graph_signature.user_inputs),
        (spec.outputs, program.graph_signature.user_outputs),
    ):
        if len(names) != len(tensors):
            problems.append(f"it has {len(names)} tensors, but {', '.join(tensors)} are declared")
            continue
        for (name, tensor), node in zip(tensors.items(), names, strict=True):
            value = values[str(node)]
            given = str(value.dtype).removeprefix("torch.")
            if given != tensor.dtype or len(value.shape) != len(tensor.shape):
                problems.append(f"{name} is {given} with {len(value.shape)} axes, but declared as {tensor.dtype}")
                continue
            for axis, size in zip(tensor.shape, value.shape, strict=True):
                problems += _axis(program, spec, name, axis, size)
    return problems


def _axis(program: "ExportedProgram", spec: GraphSpec, name: str, axis: int | str, size: Any) -> list[str]:
    # A number for an axis with a declared range is a size that was frozen during tracing.
    if isinstance(axis, int) or isinstance(size, int):
        return [] if axis == size else [f"an axis of {name} is {size}, but declared as {axis}"]
    bounds, declared = program.range_constraints[size.node.expr], spec.axes[axis]
    if (int(bounds.lower), int(bounds.upper)) == (declared.min, declared.max):
        return []
    return [
        f"{axis} of {name} is from {bounds.lower} to {bounds.upper}, but declared as {declared.min} to {declared.max}"
    ]


def _precision(calls: "list[Node]", constants: Mapping[str, Array], dtype: str) -> Check:
    """Check that no number is narrower than the dtype of the graph, including intermediate values."""
    accepted = {dtype, *_ELSE}
    problems = [
        f"{name} is {array.dtype.name}" for name, array in constants.items() if array.dtype.name not in accepted
    ]
    problems += [f"{node.name} is {given}" for node in calls for given in _dtypes(node) if given not in accepted]
    return make_check("precision", problems, f"nothing narrower than {dtype}")


def _dtypes(node: "Node") -> Iterator[str]:
    """Dtypes among the arguments of a call."""
    import torch

    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, torch.dtype):
            yield str(argument).removeprefix("torch.")


def _epsilon(node: "Node") -> float:
    # Arguments are input, shape, weight and epsilon; without an epsilon, torch uses that of the dtype.
    given: Any = node.kwargs.get("eps", next(iter(node.args[3:]), None))
    return math.nan if given is None else given


def _no_traces(program: "ExportedProgram", model: Any, manifest: Manifest) -> Check:
    problems = [f"a stack trace on {node.name}" for node in program.graph.nodes if node.meta.get("stack_trace")]
    # Names of operators, modules and tensors have no slashes, so a slash indicates a path.
    problems += [f"{text!r} looks like a path" for text in _texts(model) if "/" in text or "\\" in text]
    return make_check("traces", problems + other_torch(model["torch_version"], manifest), "no path and no stack trace")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value
