"""Matrices that the exporter transposes: a tied head shares the embedding's constant; others are stored transposed.

The exporter stores transposed copies of matrices up to 2 GiB; above that, it leaves a ``Transpose`` in the graph, which
a runtime would compute at each start or in each call.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["store_turned", "tie_head"]


def store_turned(model: "onnx_ir.Model") -> None:
    """Replace each ``Transpose`` of a constant matrix by a constant, which is computed when the model is saved."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        held = None if source is None else source.const_value
        if source is None or held is None or len(held.shape) != 2:  # noqa: PLR2004 - a matrix
            continue
        (old,) = node.outputs
        turned = ir.LazyTensor(
            partial(_turned, held), dtype=held.dtype, shape=ir.Shape(held.shape.numpy()[::-1]), name=old.name
        )
        constant = ir.Value(name=old.name, const_value=turned, shape=turned.shape, type=ir.TensorType(held.dtype))
        graph.register_initializer(constant)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [], [old], [constant])
        _remove_unused(graph, source)


def tie_head(model: "onnx_ir.Model", vocab_size: int, embed_dim: int) -> None:
    """Replace the product in the head by a ``Gemm`` with ``transB``, which reads the embedding ``[V, D]`` itself.

    Args:
        model: model as it was exported, with a product ``[B, S, D] x [D, V]``, whose right side is a transposed copy
            of the embedding or, if the exporter did not compute this copy, a ``Transpose`` of the embedding.
        vocab_size: number of tokens ``V``.
        embed_dim: model width ``D``.
    """
    import onnx_ir as ir

    graph = model.graph
    embedding = next(
        node.inputs[0]
        for node in graph
        if node.op_type == "Gather" and _shape_of(node.inputs[0]) == (vocab_size, embed_dim)
    )
    assert embedding is not None
    product = next(node for node in graph if node.op_type == "MatMul" and _is_turned(node.inputs[1], embedding))
    x, turned = product.inputs
    assert x is not None
    assert turned is not None

    def number(name: str, values: list[int]) -> ir.Value:
        constant = ir.Value(
            name=name, const_value=ir.tensor(np.array(values, np.int64), name=name), shape=ir.Shape([len(values)]),
            type=ir.TensorType(ir.DataType.INT64),
        )  # fmt: skip
        graph.register_initializer(constant)
        return constant

    rows = ir.node("Reshape", [x, number("head.rows", [-1, embed_dim])])
    gemm = ir.node("Gemm", [rows.outputs[0], embedding], attributes={"transB": 1})
    lead = ir.node("Shape", [x], attributes={"start": 0, "end": 2})
    shape = ir.node("Concat", [lead.outputs[0], number("head.width", [vocab_size])], attributes={"axis": 0})
    logits = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
    nodes = [rows, gemm, lead, shape, logits]
    for index, node in enumerate(nodes):
        node.name = f"head.{index}"
        node.outputs[0].name = f"head.{index}.output"
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], nodes, list(product.outputs), list(logits.outputs)
    )
    _remove_unused(graph, turned)


def _turned(held: "onnx_ir.TensorProtocol") -> "onnx_ir.TensorProtocol":
    import onnx_ir as ir

    return ir.tensor(np.ascontiguousarray(held.numpy().T))


def _remove_unused(graph: "onnx_ir.Graph", value: "onnx_ir.Value") -> None:
    """Remove a constant, or a node and its constants, unless something still reads it."""
    if value.uses():
        return
    node = value.producer()
    if node is None:
        graph.initializers.pop(str(value.name))
        return
    sources = [source for source in node.inputs if source is not None]
    graph.remove(node, safe=True)
    for source in sources:
        _remove_unused(graph, source)


def _is_turned(value: "onnx_ir.Value | None", embedding: "onnx_ir.Value") -> bool:
    """True if a value is the transpose of the embedding, as a constant or as a node."""
    node = None if value is None else value.producer()
    if node is not None:
        source = node.inputs[0]
        return node.op_type == "Transpose" and (source is embedding or _are_equal(source, embedding, turned=False))
    return _are_equal(value, embedding, turned=True)


def _are_equal(value: "onnx_ir.Value | None", other: "onnx_ir.Value", *, turned: bool) -> bool:
    """True if two constants are equal matrices, where the second one is transposed if ``turned`` is true."""
    held, expected = None if value is None else value.const_value, other.const_value
    if held is None or expected is None:
        return False
    shape = tuple(expected.shape)
    if tuple(held.shape) != (shape[::-1] if turned else shape):
        return False
    numbers = expected.numpy()
    return np.array_equal(held.numpy(), numbers.T if turned else numbers)


def _shape_of(value: "onnx_ir.Value | None") -> tuple[int, ...] | None:
    """Shape of a constant; ``None`` for other values."""
    held = None if value is None else value.const_value
    return None if held is None else tuple(held.shape.numpy())
