"""The nodes of an ONNX model, for drawings."""

from pathlib import Path

from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import GraphNode, NodeKind
from diffdeploy.formats.onnx.external import load_model
from diffdeploy.formats.onnx.names import MATMUL_NBITS, ORT_ATTENTION

__all__ = ["nodes"]

_PRODUCTS = {"Gemm", "MatMul", MATMUL_NBITS}
_LAYOUT = {"Cast", "Expand", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def nodes(directory: Path) -> list[GraphNode]:
    """All nodes, in the order of the graph.

    Args:
        directory: directory of the bundle.

    Raises:
        ExportError: the model cannot be read.
    """
    try:
        graph = load_model(directory, weights=False).graph
    except Exception as error:
        raise ExportError(str(error)) from error
    operators = {node.op_type for node in graph.node}
    # Before operator set 23, attention is decomposed into operators around a softmax.
    attention = {"Attention", ORT_ATTENTION} & operators or {"Softmax"}
    constants = {tensor.name for tensor in graph.initializer}
    sizes: set[str] = set()
    found = []
    for node in graph.node:
        takes = tuple(name for name in node.input if name and name not in constants)
        kind: NodeKind = "attention" if node.op_type in attention else "layout" if node.op_type in _LAYOUT else "other"
        own = tuple(name for name in node.input if name in constants and "." in name)
        # Before operator set 23, the scores are products, too, but not with weights.
        if node.op_type in _PRODUCTS and len(takes) < len(node.input):
            kind = "projection"
        # Nodes that read only sizes compute sizes, unless they look up a part of a table.
        if node.op_type in ("Shape", "Size") or (takes and not own and sizes.issuperset(takes)):
            kind = "sizes"
            sizes |= set(node.output)
        found.append(GraphNode(node.op_type, kind, takes, tuple(node.output), own))
    return found
