"""The device that a graph is traced for, which may differ from the one that it is traced on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from diffdeploy.exclusive import replaced

__all__ = ["ANY_DEVICE", "may_run_on_cuda", "runs_on_cuda", "traced_for"]

# Target of a graph that users may load on any device.
ANY_DEVICE = "any"

# A plain global, since `torch.compile` does not trace context variables.
_traced_for: str | None = None


@contextmanager
def traced_for(device: str) -> Iterator[None]:
    """Trace graphs in the ``with`` block for ``device``; only one thread at a time may do so, as with all tracing.

    Args:
        device: target device, ``cpu``, ``cuda``, ``cuda:N`` or `ANY_DEVICE`.
    """
    with replaced(sys.modules[__name__], "_traced_for", device):
        yield


def runs_on_cuda(tensor: Tensor) -> bool:
    """True if computations on a tensor will run on CUDA."""
    return tensor.is_cuda if _traced_for is None else _traced_for.startswith("cuda")


def may_run_on_cuda(tensor: Tensor) -> bool:
    """True if computations on a tensor run on CUDA, or if the traced graph may be loaded there."""
    return _traced_for == ANY_DEVICE or runs_on_cuda(tensor)
