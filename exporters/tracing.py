"""Tracing of a block into the graph that a `GraphSpec` declares, shared by the exporters that use torch.export."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffdeploy.graphs import GraphSpec, run_graph
from diffdeploy.modules import AnyModule
from diffdeploy.ops.target import ANY_DEVICE, traced_for

__all__ = ["GraphModule", "example", "trace"]


class GraphModule(nn.Module):
    """A block or model with the signature of an artifact: it takes and returns tensors in the artifact's order."""

    def __init__(self, block: AnyModule, spec: GraphSpec) -> None:
        super().__init__()
        self.block, self.spec = block, spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the block on the inputs of `GraphSpec.inputs`, in that order."""
        spec = self.spec
        inputs = dict(zip(spec.inputs, tensors, strict=True))
        outputs = run_graph(self.block, inputs, last_only=spec.logits == "last", in_place=spec.cache == "in-place")
        return tuple(outputs[name] for name in spec.outputs)


def example(spec: GraphSpec, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Tensors to trace with, and the dynamic axes of each.

    Sizes of 0 and 1 would become constants in the trace; the verification shows that the graph supports them.
    """
    axes: dict[str, Any] = {
        name: torch.export.Dim(name, min=bounds.min, max=bounds.max) for name, bounds in spec.axes.items()
    }
    sizes = {
        "batch_size": min(3, spec.axes["batch_size"].max),
        "sequence_length": 2,
        "past_sequence_length": 2,
        "total_sequence_length": 4,
    }
    if "total_sequence_length" in axes:
        # Derived from its parts, since with an in-place cache, torch before 2.13 would reject the declared range: it
        # does not know that min(T, 2 T) is T.
        axes["total_sequence_length"] = torch.export.Dim.DYNAMIC
    tensors, dynamic = [], []
    for tensor in spec.inputs.values():
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
        tensors.append(torch.ones(shape, dtype=torch.int64 if tensor.dtype == "int64" else dtype))
        dynamic.append({index: axes[axis] for index, axis in enumerate(tensor.shape) if isinstance(axis, str)})
    return tuple(tensors), tuple(dynamic)


@contextmanager
def _with_conditions_forgotten() -> Iterator[None]:
    """Forget what dynamo compiled for `torch.cond` in the ``with`` block.

    The compiled code has guards that inspect the buffers of which the caches are views. These guards would fail when a
    later model whose caches are not views is traced.
    """
    try:
        yield
    finally:
        torch.compiler.reset()


def trace(block: AnyModule, spec: GraphSpec, device: str = "cpu") -> torch.export.ExportedProgram:
    """Trace a block into an exported program with the declared ranges, and without information about this machine.

    It is traced on the CPU and moved: on CUDA, torch compares strides to choose a kernel, and turns the result into a
    condition on the sizes.

    Args:
        block: frozen block on the CPU.
        spec: interface of the graph.
        device: target device of the program; for `ANY_DEVICE`, the program stays on the CPU.
    """
    from torch.export.passes import move_to_device_pass
    from torch.utils._sympy.value_ranges import ValueRanges

    spec = spec.of_artifact()
    tensors, dynamic = example(spec, getattr(torch, spec.dtype))
    # Implementations depend on the target device, and would otherwise see the CPU that they are traced on.
    with traced_for(device), _with_conditions_forgotten() if spec.cache == "in-place" else nullcontext():
        program = torch.export.export(GraphModule(block, spec), tensors, dynamic_shapes=(dynamic,))
    nodes = {node.name: node for node in program.graph.nodes}
    for tensor, name in zip(spec.inputs.values(), program.graph_signature.user_inputs, strict=True):
        for axis, size in zip(tensor.shape, nodes[str(name)].meta["val"].shape, strict=True):
            # Without a declared range, torch assumes 2 as the minimum.
            if axis == "total_sequence_length" and not isinstance(size, int):
                total = spec.axes[axis]
                program.range_constraints[size.node.expr] = ValueRanges(total.min, total.max)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                # Stack traces contain paths of this machine.
                node.meta.pop("stack_trace", None)
    return (
        program
        if device in ("cpu", ANY_DEVICE)
        else move_to_device_pass(program, f"{device}:{torch.cuda.current_device()}")
    )
