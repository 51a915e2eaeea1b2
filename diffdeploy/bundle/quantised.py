"""Matrices in blocks of 4-bit or 8-bit numbers, one scale per block: their storage in a bundle, and their values.

Source of the layout: operator ``MatMulNBits`` in onnxruntime's ``ContribOperators.md``, without zero points.

Shape suffixes: N rows of a matrix, K columns, b blocks of a row, c bytes of a block, n numbers of a block.
"""

import logging
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyModel, DecoderConfig, is_lambda_vector
from diffdeploy.errors import UnavailableError
from diffdeploy.records import Record

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BLOCK_SIZES",
    "HEAD",
    "Activations",
    "Packed",
    "Quantisation",
    "WeightBits",
    "dequantised",
    "packed_weights",
    "quantised",
    "stored_tensors",
    "with_own_head",
]

WeightBits = Literal["int8", "int4"]
Activations = Literal["float32", "int8"]
BLOCK_SIZES = (16, 32, 64, 128, 256)
HEAD = "lm_head.weight"

# Suffixes of the tensors that replace a matrix in a bundle.
_BLOCKS, _SCALES = ".blocks", ".scales"
# Norms, lambda, biases and the embedding are not quantised.
_MATRIX = re.compile(r"layers\.\d+\.(self_attn\.(q|k|v|out)|ffn\.(gate|up|down))_proj\.weight")
_BITS_OF_BYTE = 8


class Packed(NamedTuple):
    """A quantised matrix of values ``(number - 2^(bits - 1)) * scale``; the first number of a byte is in its low bits.

    Attributes:
        blocks: uint8 ``[N, b, c]``; the last block of a row is padded.
        scales: float32 ``[N, b]``.
    """

    blocks: Array
    scales: Array


class Quantisation(Record):
    """Quantisation of the matrices of a model.

    Attributes:
        weights: bits per number.
        block_size: count of neighbouring numbers in a row that share a scale.
        head: true if the head is quantised, too; it is then stored separately from the embedding.
        accuracy_level: attribute of ``MatMulNBits``; 0 computes in the dtype of the graph, and 4 rounds the input of
            each product to int8, in blocks of the same size.
    """

    weights: WeightBits
    block_size: Literal[16, 32, 64, 128, 256] = 32
    head: bool = False
    accuracy_level: Literal[0, 4] = 0

    @property
    def bits(self) -> int:
        """Bits per number."""
        return int(self.weights.removeprefix("int"))

    @property
    def activations(self) -> Activations:
        """Numbers in which a quantised matrix gets its input."""
        return "int8" if self.accuracy_level else "float32"

    @property
    def activation_blocks(self) -> int | None:
        """Count of neighbouring activations that share a scale; ``None`` if they are not quantised."""
        return self.block_size if self.accuracy_level else None

    def covers(self, name: str) -> bool:
        """True if a weight is stored in blocks."""
        return _MATRIX.fullmatch(name) is not None or (self.head and name == HEAD)

    def num_blocks(self, num_columns: int) -> int:
        """Number of blocks in a row."""
        return -(-num_columns // self.block_size)

    def numbers(self, packed: Packed, num_columns: int) -> Array:
        """Dequantise to the matrix ``[N, K]``, in the dtype of the scales."""
        blocks = packed.blocks
        if self.bits < _BITS_OF_BYTE:
            mask = 2**self.bits - 1
            blocks = np.stack((blocks & mask, blocks >> self.bits), axis=-1).reshape(*blocks.shape[:2], -1)
        whole_Nbn = blocks.astype(packed.scales.dtype) - 2 ** (self.bits - 1)
        rows: Array = (whole_Nbn * packed.scales[..., None]).reshape(len(blocks), -1)
        return np.ascontiguousarray(rows[:, :num_columns])


def stored_tensors(
    config: AnyModel, quantisation: Quantisation | None, dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor that a bundle stores for the weights of a config, by name.

    Args:
        config: config of the block or the model.
        quantisation: quantisation of its matrices, or ``None``.
        dtype: dtype of the graph.
    """
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in config.weight_shapes().items():
        if quantisation is None or not quantisation.covers(name):
            stored[name] = ("float32" if is_lambda_vector(name) else dtype, shape)
            continue
        rows, columns = shape
        lead = (rows, quantisation.num_blocks(columns))
        num_bytes = quantisation.block_size * quantisation.bits // _BITS_OF_BYTE
        stored |= {name + _BLOCKS: ("uint8", (*lead, num_bytes)), name + _SCALES: (dtype, lead)}
    return stored


def quantised(weights: Mapping[str, Array], quantisation: Quantisation) -> dict[str, Array]:
    """Quantise weights with onnxruntime's own quantiser, into the form in which a bundle stores them.

    Args:
        weights: canonical weights, float32.
        quantisation: kind of quantisation.

    Raises:
        UnavailableError: onnxruntime is not installed, or lacks the quantiser.
    """
    stored = {}
    quantiser = _Quantiser(quantisation)
    for name, array in weights.items():
        if not quantisation.covers(name):
            stored[name] = array
            continue
        packed = quantiser(array)
        stored[name + _BLOCKS], stored[name + _SCALES] = packed.blocks, packed.scales
    return stored


def packed_weights(stored: Mapping[str, Array]) -> dict[str, Packed]:
    """Quantised matrices of a bundle, by the names of their weights."""
    names = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    return {name: Packed(stored[name + _BLOCKS], stored[name + _SCALES]) for name in names}


def dequantised(stored: Mapping[str, Array], config: AnyModel, quantisation: Quantisation) -> dict[str, Array]:
    """Convert the stored weights of a bundle to canonical weights.

    Args:
        stored: stored weights, as returned by `quantised`.
        config: config of the model.
        quantisation: quantisation of the stored weights.
    """
    packed = packed_weights(stored)
    return {
        name: quantisation.numbers(packed[name], shape[1]) if name in packed else stored[name]
        for name, shape in config.weight_shapes().items()
    }


def with_own_head(config: AnyModel, weights: "Mapping[str, Tensor]") -> "tuple[AnyModel, Mapping[str, Tensor]]":
    """Prepare a model for quantising its head: a tied head becomes a copy of the embedding, which stays unchanged."""
    if not isinstance(config, DecoderConfig) or not config.tied:
        return config, weights
    # Weights of checkpoints are read lazily.
    both = ChainMap({HEAD: weights["embedding.weight"]}, weights)  # type: ignore[arg-type]
    return replace(config, tied=False), both


class _Quantiser:
    """onnxruntime's quantiser, applied to matrices whose rows are outputs."""

    def __init__(self, quantisation: Quantisation) -> None:
        # Importing it would configure logging for the whole process, unless that has already been done.
        root, nothing = logging.getLogger(), logging.NullHandler()
        root.addHandler(nothing)
        try:
            from onnxruntime.quantization.matmul_nbits_quantizer import (
                DefaultWeightOnlyQuantConfig,
                DefaultWeightOnlyQuantizer,
            )
        except ImportError as error:
            raise UnavailableError(
                "weights are quantised by onnxruntime, which is not installed; pip install 'diffdeploy[export,cpu]'"
            ) from error
        finally:
            root.removeHandler(nothing)
        config = DefaultWeightOnlyQuantConfig(
            block_size=quantisation.block_size, is_symmetric=True, bits=quantisation.bits
        )
        self._quantiser = DefaultWeightOnlyQuantizer(config)

    def __call__(self, matrix_NK: Array) -> Packed:
        blocks, scales, _ = self._quantiser.qbits_block_quant(np.ascontiguousarray(matrix_NK.T))
        return Packed(blocks, scales)
