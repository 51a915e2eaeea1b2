"""One thread at a time where torch or Python keep settings for the whole process.

Tracing, loading of compiled artifacts and the filter of warnings all change such settings for a while. Two threads that
did so at once would restore each other's changes, and leave a wrong setting behind for good.
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
    """Let no other thread change process-wide settings while the block runs."""
    with _lock:
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module or a class another value while the block runs."""
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
