"""Reading checkpoints: files, the layouts found in them, and the canonical block that comes out."""

from diffdeploy.checkpoints.reader import BlockSummary, Checkpoint, CheckpointOptions, read_checkpoint, summarise

__all__ = ["BlockSummary", "Checkpoint", "CheckpointOptions", "read_checkpoint", "summarise"]
