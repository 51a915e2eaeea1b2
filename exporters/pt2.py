"""``torch.export``: a program that any Python with torch loads, with its ranges checked by itself."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffdeploy.exporters.tracing import check, trace
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock
from diffdeploy.runtime.torch_programs import MODEL

if TYPE_CHECKING:
    from diffdeploy.exporters.base import ExportOptions

__all__ = ["check", "lower"]


def lower(block: AttentionBlock, spec: GraphSpec, directory: Path, options: "ExportOptions") -> dict[str, int | str]:
    """Write ``model.pt2``; `torch.export.load` reads it, and its module takes the graph's inputs in their order."""
    torch.export.save(trace(block, spec), directory / MODEL)
    return {}
