"""diffdeploy: differential attention from a checkpoint to a verified deployment bundle.

The public names below are imported on first use, so that ``import diffdeploy`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint, write_checkpoint
    from diffdeploy.config import DiffAttentionConfig
    from diffdeploy.modules import DiffAttention
    from diffdeploy.runtime import load

__all__ = [
    "CheckpointOptions",
    "DiffAttention",
    "DiffAttentionConfig",
    "__version__",
    "load",
    "read_checkpoint",
    "write_checkpoint",
]

__version__ = "0.1.0"

_HOMES = {
    "CheckpointOptions": "diffdeploy.checkpoints",
    "DiffAttention": "diffdeploy.modules",
    "DiffAttentionConfig": "diffdeploy.config",
    "load": "diffdeploy.runtime",
    "read_checkpoint": "diffdeploy.checkpoints",
    "write_checkpoint": "diffdeploy.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffdeploy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
