"""The weights of a bundle: cast as the artifact holds them, and read back as the numbers that it computes with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array, read_safetensors, to_tensor
from diffdeploy.bundle.quantised import dequantised
from diffdeploy.bundle.store import WEIGHTS, Bundle
from diffdeploy.config import is_lambda_vector
from diffdeploy.errors import InputError
from diffdeploy.graphs import DType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cast_weights", "read_tensors", "read_weights"]


def cast_weights(weights: "Mapping[str, Tensor]", dtype: DType) -> "dict[str, Tensor]":
    """Weights as an artifact of ``dtype`` holds them; the lambda vectors stay fp32, as in the block.

    Args:
        weights: canonical weights of any floating dtype.
        dtype: dtype of the graph.

    Raises:
        InputError: a weight is too large for the dtype.
    """
    import torch

    cast = {}
    for name, tensor in weights.items():
        target = torch.float32 if is_lambda_vector(name) else getattr(torch, dtype)
        cast[name] = tensor.to(target).contiguous()
        # A cast makes infinity of what is too large (65,504 is the last in float16), and says nothing.
        if not bool(torch.isfinite(cast[name]).all()):
            raise InputError(
                f"{name} holds values up to {tensor.abs().max().item():.3g}, too large for {target}; "
                "export with --dtype float32"
            )
    return cast


def read_weights(bundle: Bundle) -> dict[str, Array]:
    """Canonical weights of a bundle in the artifact's dtype.

    Raises:
        IntegrityError: the file cannot be read.
    """
    stored, quantisation = read_safetensors(bundle.path / WEIGHTS), bundle.manifest.options.quantisation
    return stored if quantisation is None else dequantised(stored, bundle.manifest.config, quantisation)


def read_tensors(bundle: Bundle) -> "dict[str, Tensor]":
    """The same as tensors.

    Raises:
        IntegrityError: the file cannot be read.
    """
    from safetensors.torch import load_file

    if bundle.manifest.options.quantisation is None:
        # It maps the file, of which nothing is held twice.
        return load_file(bundle.path / WEIGHTS)
    return {name: to_tensor(array) for name, array in read_weights(bundle).items()}
