"""Reading checkpoints: files, the layouts found in them, and the canonical block that comes out."""

from diffdeploy.checkpoints.reader import Checkpoint, CheckpointOptions, read_checkpoint

__all__ = ["Checkpoint", "CheckpointOptions", "read_checkpoint"]
