"""Faults in the ranges and nodes of an exported program."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.formats.artifact import FileFault

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

__all__ = ["PT2_FAULTS"]


def _fault(name: str, breaks: str, edit: "Callable[[ExportedProgram], None]") -> FileFault:
    def edit_file(directory: Path) -> None:
        from diffdeploy.formats.pt2.backend import load_program
        from diffdeploy.formats.pt2.constants import save

        program = load_program(directory)
        edit(program)
        # The code of a graph module is not regenerated when its graph is edited.
        program.graph_module.recompile()
        save(program, directory)

    return FileFault(name=name, breaks=breaks, edit=edit_file)


def _narrow_the_ranges(program: "ExportedProgram") -> None:
    from torch.utils._sympy.value_ranges import ValueRanges

    for symbol, bounds in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(bounds.lower, bounds.upper - 1)


def _leave_a_stack_trace(program: "ExportedProgram") -> None:
    next(node for node in program.graph.nodes if node.op == "call_function").meta["stack_trace"] = (
        'File "/home/someone/model.py", line 1'
    )


def _after_output(program: "ExportedProgram", target: Any, *arguments: Any) -> None:
    """Insert a call between the output and the caller."""
    (end,) = (node for node in program.graph.nodes if node.op == "output")
    old: Node = end.args[0][0]
    with program.graph.inserting_before(end):
        new = program.graph.call_function(target, (old, *arguments))
    new.meta.update(old.meta)
    end.replace_input_with(old, new)
    # The signature refers to outputs by the names of nodes.
    specification = program.graph_signature.output_specs[0]
    specification.arg.name = new.name


def _add_a_softmax(program: "ExportedProgram") -> None:
    import torch

    _after_output(program, torch.ops.aten.softmax.int, -1)


def _scale_the_output(program: "ExportedProgram") -> None:
    """Multiply the output by a factor so close to 1 that it looks correct, but is wrong in the last 13 of 24 bits."""
    import torch

    _after_output(program, torch.ops.aten.mul.Tensor, 1.0 + 2**-10)


def _exchange_operands(program: "ExportedProgram") -> None:
    import torch

    # The last subtraction is the difference of the streams; earlier ones belong to the rotary embedding.
    last = [node for node in program.graph.nodes if node.target == torch.ops.aten.sub.Tensor][-1]
    last.args = (last.args[1], last.args[0])


PT2_FAULTS = [
    _fault("pt2_ranges_narrowed", "the largest sizes are refused", _narrow_the_ranges),
    _fault("pt2_stack_trace_left", "a path of the exporting machine", _leave_a_stack_trace),
    _fault("pt2_third_softmax", "a softmax after the output", _add_a_softmax),
    _fault("pt2_output_scaled", "the output is a thousandth too large", _scale_the_output),
    _fault("pt2_operands_exchanged", "the last subtraction the other way round", _exchange_operands),
]
