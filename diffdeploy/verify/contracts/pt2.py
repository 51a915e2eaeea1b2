"""The contract of an exported program: two attentions, the declared ranges, the bundle's weights bit for bit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array, to_array
from diffdeploy.bundle import Bundle
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.contracts.common import check, declared, lambda_constant, rope_constants, weights_bit_for_bit
from diffdeploy.verify.report import Check, GraphFacts

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["checks", "facts"]


def _program(bundle: Bundle) -> "ExportedProgram":
    import torch

    return torch.export.load(bundle.path / "model.pt2")


def facts(bundle: Bundle) -> GraphFacts:
    """See `diffdeploy.verify.contracts.facts`."""
    return declared(bundle, _counts(_program(bundle))[0])


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `diffdeploy.verify.contracts.checks`."""
    program = _program(bundle)
    tensors = {**program.state_dict, **program.constants}
    constants = {name: to_array(tensor) for name, tensor in tensors.items() if hasattr(tensor, "detach")}
    found = _counts(program)
    said = f"{found[0]} scaled_dot_product_attention and {found[1]} softmax calls"
    return [
        check("attention", [] if found == (2, 0) else [f"{said}; expected 2 and 0"], said),
        _ranges(program, bundle.manifest.graph),
        weights_bit_for_bit(constants, weights),
        lambda_constant(constants, bundle.manifest, weights),
        rope_constants(constants, bundle.manifest),
        _no_traces(program),
    ]


def _counts(program: "ExportedProgram") -> tuple[int, int]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    fused = sum("scaled_dot_product" in name for name in names)
    return fused, sum("softmax" in name for name in names)


def _ranges(program: "ExportedProgram", spec: GraphSpec) -> Check:
    """Each axis of each input must be the declared size, or a symbol with the declared range."""
    problems = []
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    values = [placeholders[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    for (name, tensor), value in zip(spec.inputs.items(), values, strict=True):
        for axis, size in zip(tensor.shape, value.shape, strict=True):
            if isinstance(axis, int) or isinstance(size, int):
                if axis != size:
                    problems.append(f"an axis of {name} is {size}, declared is {axis}")
                continue
            bounds, declared = program.range_constraints[size.node.expr], spec.axes[axis]
            if (int(bounds.lower), int(bounds.upper)) != (declared.min, declared.max):
                problems.append(
                    f"{axis} of {name} goes from {bounds.lower} to {bounds.upper}, declared is {declared.min} to "
                    f"{declared.max}"
                )
    return check("interface", problems, "sizes and ranges as declared")


def _no_traces(program: "ExportedProgram") -> Check:
    problems = [f"a stack trace on {node.name}" for node in program.graph.nodes if node.meta.get("stack_trace")]
    return check("traces", problems, "no stack trace")
