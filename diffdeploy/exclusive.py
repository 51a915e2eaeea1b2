"""A lock around code that changes settings of torch or Python for the whole process.

Tracing, loading compiled artifacts and filtering warnings all change such settings for a while. Two threads doing so at
once would restore each other's changes and leave a wrong setting behind for good.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["exclusively", "replaced", "without_warnings"]

# Reentrant, since a trace under one setting may need another.
_lock = threading.RLock()


@contextmanager
def exclusively() -> Iterator[None]:
    """Keep other threads from changing process-wide settings while the block runs."""
    with _lock:
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or a class to another value while the block runs."""
    with _lock:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide Python's warnings while the block runs."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
