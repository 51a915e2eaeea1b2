"""The eager block or model of a bundle, rebuilt from its weights and config."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffdeploy.bundle.store import Bundle
from diffdeploy.bundle.weights import read_tensors
from diffdeploy.config import AnyModel, DecoderConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffdeploy.modules import AnyModule

__all__ = ["eager_module", "frozen_module"]


def frozen_module(
    config: AnyModel, weights: "Mapping[str, Tensor]", *, impl: str, max_positions: int, dtype: "torch.dtype"
) -> "AnyModule":
    """Build the block or model of a config, frozen, on the CPU.

    Args:
        config: config of a block or a decoder.
        weights: canonical weights.
        impl: implementation of the operator; see `diffdeploy.ops.Impl`.
        max_positions: number of rows of the rotary tables.
        dtype: dtype of the module.
    """
    from diffdeploy.modules import DiffTransformer, block_class

    options: dict[str, Any] = {"impl": impl, "max_positions": max_positions, "dtype": dtype}
    if isinstance(config, DecoderConfig):
        return DiffTransformer.from_weights(config, weights, **options)
    return block_class(config).from_weights(config, weights, **options)


def eager_module(bundle: Bundle, *, impl: str, device: str = "cpu") -> "AnyModule":
    """Build the frozen block or model of a bundle in the dtype of the graph, for all its positions.

    Args:
        bundle: an opened bundle.
        impl: implementation of the operator; see `diffdeploy.ops.Impl`.
        device: device of its weights.
    """
    import torch

    spec = bundle.manifest.graph
    module = frozen_module(
        bundle.manifest.config,
        read_tensors(bundle),
        impl=impl,
        # The tables have as many rows as those in the artifact.
        max_positions=spec.axes["sequence_length"].max,
        dtype=getattr(torch, spec.dtype),
    )
    return module.to(device)
