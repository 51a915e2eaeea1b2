"""Activations in int8, as ``MatMulNBits`` rounds its input at accuracy level 4: in numpy, and in an eager model.

Source: ``QuantizeARow_CompInt8`` in MLAS, the library of onnxruntime's CPU kernels. Each row of the input is cut into
blocks, the last of which may be shorter; ``scale`` is the largest magnitude of a block over 127, and the nearest
integers to ``x / scale``, the even one of two, multiply the integers of the weights. In float32, `rounded_activations`
gives the same integers bit for bit (tests/verify/test_activations.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Quantisation

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["quantised_inputs", "rounded_activations"]

_LARGEST = 127


def rounded_activations(x: Array, block_size: int) -> Array:
    """Round activations ``[..., K]`` to int8 in blocks along the last axis; the result has the dtype of ``x``.

    Args:
        x: activations, float32 or float64; the rounding takes place in this dtype.
        block_size: count of neighbouring activations that share a scale.
    """
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_size)]
    blocks = np.pad(x, padding).reshape(*x.shape[:-1], -1, block_size)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    # Multiplied by the inverse of the scale, as in the operator: a division would round some numbers differently.
    inverse = np.divide(_LARGEST, largest, out=np.zeros_like(largest), where=largest > 0)
    rounded: Array = np.rint(blocks * inverse) * (largest / _LARGEST)
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def _rounded_tensor(x: "Tensor", block_size: int) -> "Tensor":
    """The same as `rounded_activations`."""
    import torch
    import torch.nn.functional as F

    padded = F.pad(x, (0, -x.shape[-1] % block_size))
    blocks = padded.reshape(*x.shape[:-1], -1, block_size)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, _LARGEST / largest, 0.0)
    rounded: Tensor = (blocks * inverse).round() * (largest / _LARGEST)
    return rounded.flatten(-2)[..., : x.shape[-1]]


@contextmanager
def quantised_inputs(model: "nn.Module", quantisation: Quantisation | None) -> Iterator[None]:
    """While the model runs, round the inputs of its quantised matrices as the artifact does.

    Args:
        model: eager model.
        quantisation: quantisation of its matrices; without one, or if it keeps activations, nothing is rounded.
    """
    handles = []
    if quantisation is not None and (size := quantisation.activation_blocks) is not None:
        for name, module in model.named_modules():
            if quantisation.covers(f"{name}.weight"):
                handles.append(module.register_forward_pre_hook(partial(_round_input, size)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_input(block_size: int, _module: "nn.Module", inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    (x,) = inputs
    return (_rounded_tensor(x, block_size),)
