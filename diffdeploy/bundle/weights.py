"""The weights of a bundle: cast to the artifact's dtype for storing, and read back as the numbers it computes with."""

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
    """Cast weights to the dtype of an artifact; the lambda vectors stay in fp32, as in the block.

    Args:
        weights: canonical weights of any floating dtype.
        dtype: dtype of the graph.

    Raises:
        InputError: a weight is out of range for the dtype.
    """
    import torch

    cast = {}
    for name, tensor in weights.items():
        target = torch.float32 if is_lambda_vector(name) else getattr(torch, dtype)
        cast[name] = tensor.to(target).contiguous()
        # A cast silently turns numbers beyond the range (65,504 in float16) into infinity.
        if not bool(torch.isfinite(cast[name]).all()):
            raise InputError(
                f"{name} holds values up to {tensor.abs().max().item():.3g}, too large for {target}; "
                "export with --dtype float32"
            )
    return cast


def read_weights(bundle: Bundle) -> dict[str, Array]:
    """Read the canonical weights of a bundle in the artifact's dtype.

    Raises:
        IntegrityError: the file cannot be read.
    """
    stored, quantisation = read_safetensors(bundle.path / WEIGHTS), bundle.manifest.options.quantisation
    return stored if quantisation is None else dequantised(stored, bundle.manifest.config, quantisation)


def read_tensors(bundle: Bundle) -> "dict[str, Tensor]":
    """Read the canonical weights of a bundle as tensors in the artifact's dtype.

    Raises:
        IntegrityError: the file cannot be read.
    """
    from safetensors.torch import load_file

    if bundle.manifest.options.quantisation is None:
        # The file is memory-mapped, so no data is in memory twice.
        return load_file(bundle.path / WEIGHTS)
    return {name: to_tensor(array) for name, array in read_weights(bundle).items()}
