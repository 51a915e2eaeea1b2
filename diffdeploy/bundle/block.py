"""The eager block of a bundle, rebuilt from its weights and its config."""

from typing import TYPE_CHECKING

from diffdeploy.bundle.store import WEIGHTS, Bundle

if TYPE_CHECKING:
    from diffdeploy.modules import AttentionBlock

__all__ = ["eager_block"]


def eager_block(bundle: Bundle, *, impl: str, device: str = "cpu") -> "AttentionBlock":
    """A frozen block in the dtype of the graph, for all its positions.

    Args:
        bundle: an opened bundle.
        impl: how the two attentions are computed; see `diffdeploy.ops.Impl`.
        device: where its weights are.
    """
    import torch
    from safetensors.torch import load_file

    from diffdeploy.modules import block_class

    manifest = bundle.manifest
    block = block_class(manifest.config).from_weights(
        manifest.config,
        load_file(bundle.path / WEIGHTS),
        impl=impl,
        # As many rows as the tables in the artifact have.
        max_positions=manifest.graph.axes["sequence_length"].max,
        dtype=getattr(torch, manifest.graph.dtype),
    )
    return block.to(device)
