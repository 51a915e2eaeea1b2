"""Check that the products with quantised matrices in ``model.onnx`` use the weights in the bundle's file."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, Bundle, packed_weights
from diffdeploy.formats.artifact import Check
from diffdeploy.formats.checks import make_check
from diffdeploy.formats.onnx.names import MATMUL_NBITS

if TYPE_CHECKING:
    import onnx

__all__ = ["packed_constants", "quantised_nodes", "quantised_products"]

_NUM_INPUTS = 3


def quantised_nodes(model: "onnx.ModelProto") -> "list[onnx.NodeProto]":
    """Nodes that multiply by quantised matrices."""
    return [node for node in model.graph.node if node.op_type == MATMUL_NBITS]


def packed_constants(model: "onnx.ModelProto") -> set[str]:
    """Names of the constants that contain the packed blocks of quantised weights."""
    return {node.input[1] for node in quantised_nodes(model)}


def quantised_products(model: "onnx.ModelProto", constants: Mapping[str, Array], bundle: Bundle) -> list[Check]:
    """Check that each quantised matrix is used in one product, bit-identical to the bundle, at its accuracy level.

    Args:
        model: model of the bundle.
        constants: constants of the graph, by name.
        bundle: an opened bundle; without quantised weights, there is nothing to check.
    """
    quantisation = bundle.manifest.options.quantisation
    if quantisation is None:
        return []
    shapes = bundle.manifest.config.weight_shapes()
    # Dtypes and shapes follow from the config, as was checked when the bundle was opened.
    packed = packed_weights(read_safetensors(bundle.path / WEIGHTS))
    wanted: dict[str, tuple[bytes, ...]] = {
        name: (matrix.blocks.tobytes(), matrix.scales.tobytes()) for name, matrix in packed.items()
    }
    problems, found = [], Counter[tuple[bytes, ...]]()
    by_matrix = {pair: name for name, pair in wanted.items()}
    for node in quantised_nodes(model):
        pair = tuple(constants[name].tobytes() for name in node.input[1:] if name in constants)
        # Zero points, an order of columns and a bias would be further inputs, which are rejected.
        name = by_matrix.get(pair) if len(node.input) == _NUM_INPUTS else None
        if name is None:
            problems.append(f"{node.name} multiplies by blocks and scales that weights.safetensors does not hold")
            continue
        found[pair] += 1
        rows, columns = shapes[name]
        expected = {"K": columns, "N": rows, "bits": quantisation.bits, "block_size": quantisation.block_size}
        if quantisation.accuracy_level:
            expected["accuracy_level"] = quantisation.accuracy_level
        if (given := _attributes(node)) != expected:
            problems.append(f"{node.name} has {given}, but should have {expected}")
    # Equal matrices share their constants, but each has its own product.
    due = Counter(wanted.values())
    problems += [f"{name} is not in the graph bit for bit" for name, pair in wanted.items() if found[pair] != due[pair]]
    fine = f"{len(wanted)} matrices in {quantisation.weights}, bit-identical to weights.safetensors"
    return [make_check("quantised", problems, fine)]


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    import onnx

    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    # Omitting it means 0.
    return {name: value for name, value in given.items() if (name, value) != ("accuracy_level", 0)}
