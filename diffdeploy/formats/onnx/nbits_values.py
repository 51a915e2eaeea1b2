"""Products with quantised matrices: what goes into each and comes out, and the same graph with float activations."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffdeploy.arrays import Array
from diffdeploy.bundle import Packed
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Product, ProductValues
from diffdeploy.formats.onnx.external import load_model
from diffdeploy.formats.onnx.intermediates import session_settings
from diffdeploy.formats.onnx.nbits import quantised_nodes

__all__ = ["product_values", "with_float_activations"]

_LEVEL = "accuracy_level"


def product_values(directory: Path) -> ProductValues:
    """Function that computes input and output of each quantised product of the model in a bundle.

    Raises:
        ExportError: the artifact cannot be loaded.
    """
    import onnx
    import onnxruntime

    try:
        model = load_model(directory, weights=False)
        nodes = quantised_nodes(model)
        declared = {value.name for value in model.graph.output}
        names = list(dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_settings(directory), providers=["CPUExecutionProvider"]
        )
        held = {tensor.name: tensor for tensor in load_model(directory).graph.initializer}
        matrices = [Packed(*(onnx.numpy_helper.to_array(held[name]) for name in node.input[1:3])) for node in nodes]
    except Exception as error:
        raise ExportError(str(error)) from error

    def run(inputs: Mapping[str, Array]) -> Iterator[Product]:
        try:
            values = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise ExportError(str(error)) from error
        for node, packed in zip(nodes, matrices, strict=True):
            name = node.input[1].removesuffix(".blocks")
            yield Product(name, values[node.input[0]], packed, values[node.output[0]])

    return run


def with_float_activations(directory: Path) -> bytes:
    """Content of the model file of a bundle, with accuracy level 0 in every node and otherwise unchanged."""
    model = load_model(directory, weights=False)
    for node in quantised_nodes(model):
        kept = [attribute for attribute in node.attribute if attribute.name != _LEVEL]
        del node.attribute[:]
        node.attribute.extend(kept)
    content: bytes = model.SerializeToString()
    return content
