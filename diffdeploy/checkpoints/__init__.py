"""Reading and writing checkpoints: files, the layouts found in them, and the canonical block that comes out."""

from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.reader import Checkpoint, SourceFile, list_layers, read_checkpoint
from diffdeploy.checkpoints.summary import BlockSummary, CheckpointSummary, summarise
from diffdeploy.checkpoints.writer import write_checkpoint

__all__ = [
    "BlockSummary",
    "Checkpoint",
    "CheckpointOptions",
    "CheckpointSummary",
    "SourceFile",
    "list_layers",
    "read_checkpoint",
    "summarise",
    "write_checkpoint",
]
