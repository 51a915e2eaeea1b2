"""The contract of an exported program: two attentions, the declared ranges, the bundle's weights bit for bit."""

import json
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array, to_array
from diffdeploy.bundle import Bundle
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import declared_facts, lambda_constant, make_check, rope_constants, weights_bit_for_bit
from diffdeploy.formats.pt2.backend import MODEL, load_program
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["checks", "facts"]


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    return declared_facts(bundle, _counts(bundle)[0])


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    program = load_program(bundle.path)
    tensors = {**program.state_dict, **program.constants}
    constants = {name: to_array(tensor) for name, tensor in tensors.items() if hasattr(tensor, "detach")}
    found = _counts(bundle)
    said = f"{found[0]} scaled_dot_product_attention and {found[1]} softmax calls"
    expected = 2 * len(bundle.manifest.config.blocks)
    return [
        make_check("attention", [] if found == (expected, 0) else [f"{said}; expected {expected} and 0"], said),
        _ranges(program, bundle.manifest.graph),
        weights_bit_for_bit(constants, weights),
        lambda_constant(constants, bundle.manifest, weights),
        rope_constants(constants, bundle.manifest),
        _no_traces(program),
    ]


def _counts(bundle: Bundle) -> tuple[int, int]:
    """Fused attentions and softmaxes, read from the archive, since loading it takes a second."""
    with zipfile.ZipFile(bundle.path / MODEL) as archive:
        program = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        names = [node["target"] for node in json.loads(archive.read(program))["graph_module"]["graph"]["nodes"]]
    fused = sum("scaled_dot_product" in name for name in names)
    return fused, sum("softmax" in name for name in names)


def _ranges(program: "ExportedProgram", spec: GraphSpec) -> Check:
    """Each axis of each input must be the declared size, or a symbol with the declared range."""
    problems = []
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    values = [placeholders[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    for (name, tensor), value in zip(spec.inputs.items(), values, strict=True):
        for axis, size in zip(tensor.shape, value.shape, strict=True):
            # A declared range that was traced as a number is a size that is frozen.
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
    return make_check("interface", problems, "sizes and ranges as declared")


def _no_traces(program: "ExportedProgram") -> Check:
    problems = [f"a stack trace on {node.name}" for node in program.graph.nodes if node.meta.get("stack_trace")]
    return make_check("traces", problems, "no stack trace")
