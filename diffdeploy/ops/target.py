"""Which device a graph is traced for, where that is not the one that it is traced on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from diffdeploy.exclusive import replaced

__all__ = ["ANY_DEVICE", "may_run_on_cuda", "runs_on_cuda", "traced_for"]

# Of a graph that is loaded wherever its users like.
ANY_DEVICE = "any"

# A plain global: `torch.compile` does not trace context variables.
_traced_for: str | None = None


@contextmanager
def traced_for(device: str) -> Iterator[None]:
    """Graphs that are traced in the block will run on ``device``; for one thread at a time, as tracing is.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` or `ANY_DEVICE`.
    """
    with replaced(sys.modules[__name__], "_traced_for", device):
        yield


def runs_on_cuda(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor will run on CUDA."""
    return tensor.is_cuda if _traced_for is None else _traced_for.startswith("cuda")


def may_run_on_cuda(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor runs on CUDA, or somebody may load it there."""
    return _traced_for == ANY_DEVICE or runs_on_cuda(tensor)
