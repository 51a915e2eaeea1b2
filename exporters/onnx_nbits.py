"""Products with quantised matrices: ``MatMul`` becomes ``MatMulNBits``, whose constants are the bundle's blocks."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Packed, Quantisation, packed_weights
from diffdeploy.config import AnyModel
from diffdeploy.errors import ExportError
from diffdeploy.formats.onnx.names import MATMUL_NBITS, ORT_DOMAIN

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["quantise_products"]

_OPERATOR_SET = 1


def quantise_products(
    model: "onnx_ir.Model", stored: Mapping[str, Array], config: AnyModel, quantisation: Quantisation
) -> None:
    """Turn each ``MatMul`` whose weight is a dequantised matrix into ``MatMulNBits``.

    Args:
        model: model that was exported with the dequantised weights, with products ``[B, S, K] x [K, N]``.
        stored: weights as the bundle stores them.
        config: config of the model.
        quantisation: quantisation of its matrices.

    Raises:
        ExportError: one of the matrices occurs in no ``MatMul`` of the graph.
    """
    packed, shapes = packed_weights(stored), config.weight_shapes()
    # Equal matrices share one constant of the graph, and one of them represents all.
    names: dict[bytes, str] = {}
    wanted = {}
    for name, matrix in packed.items():
        wanted[name] = _digest(quantisation.numbers(matrix, shapes[name][1]).T)
        names.setdefault(wanted[name], name)
    found = set()
    for node in list(model.graph):
        held = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if held is None or (digest := _digest(held.numpy())) not in names:
            continue
        name = names[digest]
        _replace(model.graph, node, name, packed[name], shapes[name][1], quantisation)
        found.add(digest)
    if missing := [name for name, digest in wanted.items() if digest not in found]:
        raise ExportError(f"the graph has no MatMul with {missing[0]}, so this matrix cannot be quantised")
    model.graph.opset_imports.setdefault(ORT_DOMAIN, _OPERATOR_SET)


def _digest(matrix: Array) -> bytes:
    return hashlib.sha256(repr((matrix.dtype, matrix.shape)).encode() + np.ascontiguousarray(matrix).tobytes()).digest()


def _replace(
    graph: "onnx_ir.Graph",
    product: "onnx_ir.Node",
    name: str,
    packed: Packed,
    num_columns: int,
    quantisation: Quantisation,
) -> None:
    import onnx_ir as ir

    def constant(suffix: str, array: Array) -> ir.Value:
        full = f"{name}.{suffix}"
        if full not in graph.initializers:
            tensor = ir.tensor(array, name=full)
            kind = ir.TensorType(tensor.dtype)
            graph.register_initializer(ir.Value(name=full, const_value=tensor, shape=ir.Shape(array.shape), type=kind))
        return graph.initializers[full]

    x, matrix = product.inputs
    assert matrix is not None
    attributes = {
        "K": num_columns,
        "N": len(packed.blocks),
        "bits": quantisation.bits,
        "block_size": quantisation.block_size,
    }
    # A level of 0 is the default; only the CPU provider's operator supports the attribute.
    if quantisation.accuracy_level:
        attributes["accuracy_level"] = quantisation.accuracy_level
    inputs = [x, constant("blocks", packed.blocks), constant("scales", packed.scales)]
    node = ir.node(MATMUL_NBITS, inputs, attributes=attributes, domain=ORT_DOMAIN)
    node.name = product.name
    (old,), (new,) = product.outputs, node.outputs
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, product, [product], [node], [old], [new])
    if not matrix.uses():
        graph.initializers.pop(str(matrix.name))
