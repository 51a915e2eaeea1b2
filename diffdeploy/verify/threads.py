"""Threads of the libraries with which a verification computes: numpy's matrix products, and torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

__all__ = ["blas_threads_shared", "half_the_threads"]


@cache
def _blas() -> "ThreadpoolController":
    # Found once, after numpy was imported: the search goes through all libraries of the process.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def blas_threads_shared(num_parts: int) -> Iterator[None]:
    """Divide the threads of numpy's matrix products among computations that run at the same time.

    Threads that wait for each other at the end of a small product cost more than the product.

    Args:
        num_parts: number of computations.
    """
    threads = max((int(library.num_threads) for library in _blas().lib_controllers), default=1)
    with _blas().limit(limits=max(1, threads // num_parts)):
        yield


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Leave half of the threads to the artifact, which runs concurrently: threads without their own core only wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        with blas_threads_shared(2):
            yield
    finally:
        torch.set_num_threads(threads)
