"""``torch.export``: a program that any Python with torch loads, with its ranges checked by itself."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffdeploy.errors import ExportError
from diffdeploy.exporters.tracing import check, trace
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock

if TYPE_CHECKING:
    from diffdeploy.exporters.base import ExportOptions

__all__ = ["MODEL", "check", "lower"]

MODEL = "model.pt2"


def lower(block: AttentionBlock, spec: GraphSpec, directory: Path, options: "ExportOptions") -> dict[str, int | str]:
    """Write ``model.pt2``; `torch.export.load` reads it, and its module takes the graph's inputs in their order.

    Raises:
        ExportError: the block could not be exported.
    """
    try:
        program = trace(block, spec)
        torch.export.save(program, directory / MODEL)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"torch.export failed: {error}") from error
    return {}
