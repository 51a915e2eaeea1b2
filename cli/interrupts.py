"""Ctrl-C: an interrupted command prints which files it has kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffdeploy.cli import console

__all__ = ["ended_by_interrupts", "keeping", "kept_sentence"]


def ended_by_interrupts(command: Callable[..., int]) -> Callable[..., int]:
    """Make an interrupt end the command with one sentence; typer would set an exit code without any message."""

    @wraps(command)
    def run_command(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            # Code that knows what was kept raises the interrupt again, with a sentence about it as its argument.
            said = "; ".join(("interrupted", *map(str, interrupt.args)))
            raise console.Ended(console.INTERRUPTED, said) from interrupt

    return run_command


@contextmanager
def keeping(target: Path) -> Iterator[None]:
    """In the ``with`` block, an interrupt reports whether ``target``, which appears all at once, was written."""
    before = _identity(target)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        is_new = _identity(target) not in (None, before)
        raise KeyboardInterrupt(kept_sentence([target] if is_new else [])) from interrupt


def _identity(path: Path) -> int | None:
    # A directory that a rename has moved into place has a different inode from the one before.
    return path.stat().st_ino if path.exists() else None


def kept_sentence(kept: Sequence[Path]) -> str:
    """Sentence about the complete directories that an interrupt left."""
    if not kept:
        return "nothing was kept"
    return f"{', '.join(map(str, kept))} {'are' if len(kept) > 1 else 'is'} finished and kept"
