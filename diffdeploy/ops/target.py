"""Which device a graph is traced for, where that is not the one that it is traced on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["runs_on_cuda", "traced_for"]

_traced_for: ContextVar[str | None] = ContextVar("traced_for", default=None)


@contextmanager
def traced_for(device: str) -> Iterator[None]:
    """Graphs that are traced in the block will run on ``device``."""
    token = _traced_for.set(device)
    try:
        yield
    finally:
        _traced_for.reset(token)


def runs_on_cuda(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor will run on CUDA."""
    target = _traced_for.get()
    return tensor.is_cuda if target is None else target.startswith("cuda")
