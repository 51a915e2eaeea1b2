"""The nodes of an exported program, for drawings."""

from pathlib import Path

import torch

from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import GraphNode, NodeKind
from diffdeploy.formats.pt2.backend import load_program

__all__ = ["nodes"]

_ATTENTION = "scaled_dot_product_attention"
_PRODUCTS = {"addmm", "linear", "matmul", "mm"}
_LAYOUT = {
    *("_unsafe_view", "alias", "clone", "contiguous", "expand", "flatten", "getitem", "pad", "permute", "reshape"),
    *("select", "slice", "squeeze", "to", "_to_copy", "transpose", "unbind", "unsqueeze", "view"),
}


def nodes(directory: Path) -> list[GraphNode]:
    """All calls, in the order of the program.

    Args:
        directory: directory of the bundle.

    Raises:
        IntegrityError: the program contains something that could run code when it is loaded.
        ExportError: the program cannot be read.
    """
    try:
        program = load_program(directory)
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    signature = program.graph_signature
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        given = [other.name for other in node.all_input_nodes]
        takes = tuple(name for name in given if name not in stored)
        constants = tuple(stored[name] for name in given if name in stored)
        kind = "projection" if _operator(node) in _PRODUCTS and constants else _kind(node)
        found.append(GraphNode(_operator(node), kind, takes, (node.name,), constants))
    return found


def _kind(node: torch.fx.Node) -> NodeKind:
    # These nodes compute or check numbers, not tensors.
    if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        return "sizes"
    name = _operator(node)
    return "attention" if _ATTENTION in name else "layout" if name in _LAYOUT else "other"


def _operator(node: torch.fx.Node) -> str:
    """Name of a node's operator without its overload, such as ``mul`` for ``aten.mul.Tensor``."""
    said = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(said, "__name__", said)).rpartition(".")[2]
