"""Common part of the formats that contain machine code from torch's compiler: the attention that they ship."""

from diffdeploy.config import AnyModel
from diffdeploy.formats.options import Device, ExportOptions

__all__ = ["IMPLS", "fastest_impl"]

IMPLS = ("two_call", "padded", "paired", "rows", "fused")


def fastest_impl(options: ExportOptions, config: AnyModel, device: Device) -> str:
    """See `Format.fastest_impl`.

    Args:
        options: options of the export.
        config: config of the block or the model.
        device: device to compile for.
    """
    if device == "cuda" and _takes_fused(options, config):
        return "fused"
    # `rows` reads the cache once: in one attention or, for one token, in two products. Other graphs use `padded`, since
    # torch's fused attention on the CPU requires equal widths: with wide values, `two_call` takes 1.7 to 2 times as
    # long at 2,048 positions.
    return "rows" if options.graph in ("cached", "model") else "padded"


def _takes_fused(options: ExportOptions, config: AnyModel) -> bool:
    """True if the kernel of `diffdeploy.ops.fused` supports all blocks, and is the fastest on this machine's GPU."""
    import torch

    from diffdeploy.ops.fused import is_fastest_here

    dtype = getattr(torch, options.dtype)
    return all(
        is_fastest_here(dtype, block.head_dim, block.value_dim) and (block.scale is None or block.scale > 0)
        for block in config.blocks.values()
    )
