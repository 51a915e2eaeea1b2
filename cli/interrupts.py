"""Ctrl-C: what a command says when it is interrupted, which is what it has kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffdeploy.cli import console

__all__ = ["ended_by_interrupts", "keeping", "kept_sentence"]


def ended_by_interrupts(command: Callable[..., int]) -> Callable[..., int]:
    """The command, whose interrupt ends it with one sentence; typer would turn it into an exit code without a word."""

    @wraps(command)
    def run_command(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            # Whoever knows what was kept raises it again with that.
            said = "; ".join(("interrupted", *map(str, interrupt.args)))
            raise console.Ended(console.INTERRUPTED, said) from interrupt

    return run_command


@contextmanager
def keeping(target: Path) -> Iterator[None]:
    """Within the block an interrupt says whether ``target``, a directory that appears whole, was written before it."""
    before = _identity(target)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        is_new = _identity(target) not in (None, before)
        raise KeyboardInterrupt(kept_sentence([target] if is_new else [])) from interrupt


def _identity(path: Path) -> int | None:
    # A rename brings another directory to the place.
    return path.stat().st_ino if path.exists() else None


def kept_sentence(kept: Sequence[Path]) -> str:
    """What an interrupt left, for its sentence: directories that are whole."""
    if not kept:
        return "nothing was kept"
    return f"{', '.join(map(str, kept))} {'are' if len(kept) > 1 else 'is'} finished and kept"
