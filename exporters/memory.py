"""Estimate, from the config alone, whether the export of a model fits into the memory of this machine."""

import math

from diffdeploy.config import AnyModel, DecoderConfig
from diffdeploy.errors import UnavailableError
from diffdeploy.graphs import DType
from diffdeploy.runtime.machine import free_bytes

__all__ = ["needed_bytes", "require_memory"]

# Peak memory of the exporting process: torch with its libraries for tracing, and copies of the weights in the dtype of
# the artifact. 110 M parameters in float32, 0.41 GiB, took 1.68 GiB for ONNX and 1.65 GiB for an exported program, of
# which 0.41 GiB are the mapped checkpoint, which the system can reclaim when it has to.
_LIBRARY_BYTES = 400 * 2**20
_COPIES = 2.0


def needed_bytes(config: DecoderConfig, dtype: DType) -> int:
    """Lower bound of the memory that an export of a model needs."""
    elements = sum(math.prod(shape) for shape in config.weight_shapes().values())
    return _LIBRARY_BYTES + int(_COPIES * elements * (4 if dtype == "float32" else 2))


def require_memory(config: AnyModel, dtype: DType) -> None:
    """Refuse a model that does not fit into memory; blocks are small, and are not checked.

    Args:
        config: config of the block or model.
        dtype: dtype of the artifact.

    Raises:
        UnavailableError: the export needs more memory than this machine has left, swap included.
    """
    if not isinstance(config, DecoderConfig):
        return
    try:
        free = free_bytes("cpu", swap=True)
    except (OSError, KeyError):  # the system does not report its memory, so the export is attempted
        return
    if (needed := needed_bytes(config, dtype)) > free:
        raise UnavailableError(
            f"the export needs at least {needed / 2**30:.3g} GiB of memory, but {free / 2**30:.3g} GiB are free here; "
            "free some, use a machine with more, or export in another --dtype or a block with --layer"
        )
