"""Reading and writing checkpoints: files, the layouts found in them, and the canonical block that results."""

from diffdeploy.checkpoints.diffllama import diffllama_config, write_diffllama
from diffdeploy.checkpoints.options import CheckpointOptions
from diffdeploy.checkpoints.reader import Checkpoint, SourceFile, list_layers, read_checkpoint
from diffdeploy.checkpoints.summary import BlockSummary, CheckpointSummary, summarise
from diffdeploy.checkpoints.whole import ModelCheckpoint, holds_model, read_model
from diffdeploy.checkpoints.writer import write_checkpoint

__all__ = [
    "BlockSummary",
    "Checkpoint",
    "CheckpointOptions",
    "CheckpointSummary",
    "ModelCheckpoint",
    "SourceFile",
    "diffllama_config",
    "holds_model",
    "list_layers",
    "read_checkpoint",
    "read_model",
    "summarise",
    "write_checkpoint",
    "write_diffllama",
]
