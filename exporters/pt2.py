"""Lowering to ``torch.export``: a program that any Python with torch can load, and that checks its own ranges."""

from pathlib import Path

import torch

from diffdeploy.exporters.tracing import trace
from diffdeploy.formats.pt2.backend import MODEL
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule
from diffdeploy.ops.target import ANY_DEVICE

__all__ = ["lower"]


def lower(block: AnyModule, spec: GraphSpec, directory: Path) -> None:
    """Write ``model.pt2``, which `torch.export.load` reads; its module takes the graph's inputs in order."""
    program = trace(block, spec, ANY_DEVICE)
    # Sample inputs would be a pickle in the file, and nobody needs them.
    program.example_inputs = None
    torch.export.save(program, directory / MODEL)
