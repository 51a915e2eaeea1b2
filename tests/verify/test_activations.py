"""Activations in int8, held against onnxruntime's operator and a formula in plain Python."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.bundle import BLOCK_SIZES, Packed, Quantisation, dequantised, packed_weights, quantised
from diffdeploy.graphs import graph_spec
from diffdeploy.modules import DiffTransformer
from diffdeploy.verify.activations import quantised_inputs, rounded_activations
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.eager import run_arrays
from tests.bundle.test_quantised import NAME, multiplied
from tests.support.models import decoder_weights, make_decoder


def level_4(weights: Any, block_size: Any, *, head: bool = False) -> Quantisation:
    return Quantisation(weights=weights, block_size=block_size, head=head, accuracy_level=4)


def by_the_book(row: list[float], block_size: int) -> Iterator[float]:
    """One row, number by number: integers from -127 to 127 times the scale of their block."""
    for start in range(0, len(row), block_size):
        block = row[start : start + block_size]
        scale = max(abs(number) for number in block) / 127
        # Python rounds a half to the even integer, too.
        yield from (round(number / scale) * scale if scale else 0.0 for number in block)


def drawn(shape: tuple[int, ...], block_size: int) -> Array:
    """Numbers of several magnitudes, with a block of zeros."""
    generator = np.random.default_rng(shape[-1])
    x = generator.standard_normal(shape) * 10.0 ** generator.integers(-3, 3, (*shape[:-1], 1))
    x[0, ..., :block_size] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("columns", [16, 33, 128, 344])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_formula(block_size: int, columns: int) -> None:
    x = drawn((2, 3, columns), block_size).astype(np.float64)
    expected = np.array([[*by_the_book(row, block_size)] for row in x.reshape(-1, columns).tolist()])
    np.testing.assert_allclose(rounded_activations(x, block_size), expected.reshape(x.shape), rtol=1e-14)
    assert not np.array_equal(expected.reshape(x.shape), x)


@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize(("rows", "columns"), [(7, 16), (5, 33), (64, 128), (128, 344)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_the_operator_multiplies_by_what_the_formula_gives(
    weights: str, block_size: int, rows: int, columns: int, num_rows: int
) -> None:
    how = level_4(weights, block_size)
    matrix = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    packed = packed_weights(quantised({NAME: matrix}, how))[NAME]
    numbers = how.numbers(packed, columns).astype(np.float64)
    x = drawn((num_rows + 1, columns), block_size)[1:]  # without the row of zeros
    x[0, columns // 2 :] = 0
    expected = np.array([[*by_the_book(row, block_size)] for row in x.tolist()]) @ numbers.T
    found = multiplied(packed, how, x)
    sizes = np.abs(expected).max(axis=-1, keepdims=True)
    assert (np.abs(found - expected) <= 4e-6 * sizes).all()
    # Rounding changes far more than that.
    assert (np.abs(found - x.astype(np.float64) @ numbers.T) > 1e-4 * sizes).any()


def unit_matrix(how: Quantisation, size: int) -> Packed:
    """The unit matrix in blocks with a scale of 1: the operator then returns its own input, rounded."""
    width = how.num_blocks(size) * how.block_size
    whole: Array = np.full((size, width), 2 ** (how.bits - 1), np.uint8)
    whole[np.arange(size), np.arange(size)] += 1
    if how.bits == 4:
        whole = whole[:, 0::2] | (whole[:, 1::2] << 4)
    return Packed(whole.reshape(size, how.num_blocks(size), -1), np.ones((size, how.num_blocks(size)), np.float32))


def next_to_boundaries(shape: tuple[int, int], block_size: int) -> Array:
    """Numbers at most two steps of float32 away from the middle between two integers."""
    generator = np.random.default_rng(block_size)
    scales = (0.5 + generator.random((shape[0], -(-shape[1] // block_size)))).astype(np.float32)
    scales = scales.repeat(block_size, axis=1)[:, : shape[1]]
    x = ((generator.integers(-126, 126, shape) + 0.5) * (scales.astype(np.float64) / 127)).astype(np.float32)
    for _ in range(2):
        x = np.nextafter(x, x + generator.integers(-1, 2, shape).astype(np.float32))
    x[:, ::block_size] = scales[:, ::block_size]
    return x


@pytest.mark.parametrize("num_rows", [1, 64])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_integers_are_those_of_the_operator_bit_for_bit(weights: str, block_size: int, num_rows: int) -> None:
    how, columns = level_4(weights, block_size), 3 * block_size + block_size // 2
    x = next_to_boundaries((num_rows, columns), block_size)
    # A step is a 127th of the largest number of a block, which is its first.
    steps = (x[:, ::block_size] / np.float32(127)).astype(np.float64).repeat(block_size, axis=1)[:, :columns]
    ours, operators = rounded_activations(x, block_size), multiplied(unit_matrix(how, columns), how, x)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.rint(ours / steps), np.rint(operators / steps))
    # The division of the formula rounds some of them differently.
    divided = np.rint(x / steps.astype(np.float32))
    assert num_rows == 1 or not np.array_equal(divided, np.rint(operators / steps))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("block_size", [16, 256])
def test_an_eager_model_rounds_as_the_formula_does(block_size: int, *, head: bool) -> None:
    config, how = make_decoder(num_layers=2), level_4("int8", block_size, head=head)
    given = {name: tensor.float().numpy() for name, tensor in decoder_weights(config).items()}
    weights = {
        name: array.astype(np.float64) for name, array in dequantised(quantised(given, how), config, how).items()
    }
    spec = graph_spec("model", config, dtype="float32", max_batch_size=2, max_sequence_length=24)
    tensors = {name: to_tensor(array) for name, array in weights.items()}
    model = DiffTransformer.from_weights(config, tensors, impl="naive", max_positions=24, dtype=torch.float64)
    inputs = Case(batch_size=2, sequence_length=7, past_length=5, seed=3).inputs(spec)
    run = run_arrays(model, dtype=torch.float64)
    # In float64, no number is close enough to a boundary to be rounded differently.
    plain, rounded = (exact_outputs(config, weights, inputs, spec, each) for each in (None, how))
    with quantised_inputs(model, how):
        found = run(inputs)
    for name in spec.outputs:
        size = np.abs(rounded[name]).max()
        np.testing.assert_allclose(found[name], rounded[name], rtol=0, atol=1e-9 * size)
    assert np.abs(rounded["logits"] - plain["logits"]).max() > 1e-3 * np.abs(plain["logits"]).max()
    # Afterwards, and without quantised activations, the model is as it was.
    keeps = how.model_copy(update={"accuracy_level": 0})
    with quantised_inputs(model, keeps):
        np.testing.assert_allclose(run(inputs)["logits"], plain["logits"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(run(inputs)["logits"], plain["logits"], rtol=0, atol=1e-9)


def test_the_head_is_rounded_only_if_it_is_quantised() -> None:
    config = make_decoder(num_layers=1)
    weights = {name: tensor.numpy() for name, tensor in decoder_weights(config).items()}
    spec = graph_spec("model", config, dtype="float32", max_batch_size=2, max_sequence_length=24)
    inputs = Case(batch_size=1, sequence_length=3, seed=0).inputs(spec)
    without, with_head = (
        exact_outputs(config, weights, inputs, spec, level_4("int4", 16, head=head)) for head in (False, True)
    )
    np.testing.assert_array_equal(without["present.0.key"], with_head["present.0.key"])
    assert not np.array_equal(without["logits"], with_head["logits"])
