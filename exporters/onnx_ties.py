"""A tied head that shares the embedding's constant: the exporter would store a transposed copy instead."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["tie_head"]


def tie_head(model: "onnx_ir.Model", vocab_size: int, embed_dim: int) -> None:
    """Replace the product in the head by a ``Gemm`` with ``transB``, which reads the embedding ``[V, D]`` itself.

    Args:
        model: model as it was exported, with a product ``[B, S, D] x [D, V]``.
        vocab_size: number of tokens ``V``.
        embed_dim: model width ``D``.
    """
    import onnx_ir as ir

    graph = model.graph
    embedding = next(node.inputs[0] for node in graph if node.op_type == "Gather" and _is(node.inputs[0], vocab_size))
    product = next(
        node for node in graph if node.op_type == "MatMul" and _is(node.inputs[1], embed_dim, embedding, turned=True)
    )
    x, copy = product.inputs
    assert embedding is not None
    assert x is not None
    assert copy is not None

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
    if not copy.uses():
        graph.initializers.pop(str(copy.name))


def _is(
    value: "onnx_ir.Value | None", rows: int, other: "onnx_ir.Value | None" = None, *, turned: bool = False
) -> bool:
    """True if a value is an initializer of ``rows`` rows, equal to another one or, if ``turned``, to its transpose."""
    held = None if value is None else value.const_value
    if held is None or len(held.shape) != 2 or held.shape[0] != rows:  # noqa: PLR2004 - a matrix
        return False
    if not turned:
        return True
    source = None if other is None else other.const_value
    return source is not None and np.array_equal(held.numpy(), source.numpy().T)
