"""Matrices in blocks of a few bits: the numbers that they are, held against onnxruntime's own operator."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from pydantic import ValidationError

from diffdeploy.arrays import Array
from diffdeploy.bundle.quantised import (
    BLOCK_SIZES,
    Packed,
    Quantisation,
    dequantised,
    packed_weights,
    quantised,
    stored_tensors,
)
from tests.support.models import decoder_weights, make_decoder

NAME = "layers.0.ffn.up_proj.weight"


def multiplied(packed: Packed, how: Quantisation, x_SK: Array) -> Array:
    """``x W^T`` by the operator that shipped graphs have."""
    (rows, _), columns = packed.scales.shape, x_SK.shape[1]
    attributes = {"K": columns, "N": rows, "bits": how.bits, "block_size": how.block_size}
    if how.accuracy_level:
        attributes["accuracy_level"] = how.accuracy_level
    node = helper.make_node("MatMulNBits", ["x", "blocks", "scales"], ["y"], domain="com.microsoft", **attributes)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind, x_SK.shape)],
        [helper.make_tensor_value_info("y", kind, [len(x_SK), rows])],
        [onnx.numpy_helper.from_array(packed.blocks, "blocks"), onnx.numpy_helper.from_array(packed.scales, "scales")],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    product: Array = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x_SK})[0]
    return product


@pytest.mark.parametrize("columns", [16, 33, 344])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_the_numbers_are_those_that_the_operator_multiplies_with(weights: Any, block_size: Any, columns: int) -> None:
    how = Quantisation(weights=weights, block_size=block_size)
    matrix = np.random.default_rng(columns).standard_normal((7, columns)).astype(np.float32)
    packed = packed_weights(quantised({NAME: matrix}, how))[NAME]
    numbers = how.numbers(packed, columns)
    # Rows of the unit matrix give the columns; a sum of one product is not rounded twice.
    np.testing.assert_array_equal(multiplied(packed, how, np.eye(columns, dtype=np.float32)), numbers.T)
    # A step is as large as the largest number of its block over half the range.
    steps = np.abs(packed.scales).repeat(block_size, axis=1)[:, :columns]
    # The largest of the other sign may lie beyond the range, by one step.
    assert (np.abs(numbers - matrix) <= steps * 1.001).all()
    assert np.mean(np.abs(numbers - matrix) <= steps * 0.501) > 0.9


def test_what_is_stored_has_the_declared_names_dtypes_and_shapes() -> None:
    config = make_decoder(num_layers=2)
    weights = {name: tensor.float().numpy() for name, tensor in decoder_weights(config).items()}
    for head in (False, True):
        how = Quantisation(weights="int4", block_size=16, head=head)
        stored = quantised(weights, how)
        assert {n: (a.dtype.name, a.shape) for n, a in stored.items()} == stored_tensors(config, how, "float32")
        numbers = dequantised(stored, config, how)
        assert list(numbers) == list(config.weight_shapes())
        changed = {name for name in weights if not np.array_equal(weights[name], numbers[name])}
        matrices = {n for n in weights if n.startswith("layers") and n.endswith("_proj.weight")}
        assert changed == matrices | ({"lm_head.weight"} if head else set())


def test_records_of_earlier_versions_say_that_activations_are_floats() -> None:
    earlier = Quantisation.model_validate({"weights": "int4", "block_size": 32, "head": False, "accuracy_level": 0})
    assert earlier == Quantisation(weights="int4")
    assert (earlier.activations, earlier.activation_blocks) == ("float32", None)
    level_4 = Quantisation(weights="int8", block_size=64, accuracy_level=4)
    assert (level_4.activations, level_4.activation_blocks) == ("int8", 64)
    # Level 1 is float32 by another name, and 2 and 3 are narrower floats, which no export writes.
    for level in (1, 2, 3, 5):
        with pytest.raises(ValidationError):
            Quantisation.model_validate({"weights": "int4", "accuracy_level": level})


def test_quantising_leaves_the_logs_of_a_process_alone(tmp_path: Path) -> None:
    # onnxruntime's module calls logging.basicConfig when it is imported first.
    import subprocess
    import sys

    lines = [
        "import logging, numpy as np",
        "from diffdeploy.bundle.quantised import Quantisation, quantised",
        f"quantised({{{NAME!r}: np.ones((2, 16), np.float32)}}, Quantisation(weights='int8'))",
        "assert logging.getLogger().handlers == [], logging.getLogger().handlers",
        f"assert logging.getLogger().level == {logging.WARNING}",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=tmp_path)
