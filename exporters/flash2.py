"""FlashAttention-2: no graph is shipped, only weights and config; the eager block runs on CUDA with flash-attn."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.errors import InputError
from diffdeploy.exporters import tracing
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock

if TYPE_CHECKING:
    from diffdeploy.exporters.base import ExportOptions

__all__ = ["check", "lower"]


def check(options: "ExportOptions") -> None:
    """Refuse what FlashAttention-2 does not have.

    Raises:
        InputError: a graph with a mask, or an option of another format.
    """
    tracing.check(options)
    if options.graph != "plain":
        raise InputError(f"graph is {options.graph}, and FlashAttention-2 takes no mask; accepted for flash2 is plain")


def lower(block: AttentionBlock, spec: GraphSpec, directory: Path, options: "ExportOptions") -> dict[str, int | str]:
    """Write nothing: weights and config are in every bundle."""
    return {}
