"""Fresh Python processes that run one module of diffdeploy, how they ended, and memory that a process returns."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import diffdeploy

__all__ = ["WorkerProcess", "return_freed_memory"]


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can; otherwise it keeps some of it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class WorkerProcess:
    """A process running ``python -m module``.

    At the end of the ``with`` block, the process is killed if the block failed; otherwise the block waits for it.

    Args:
        module: dotted name of a module of diffdeploy.
        arguments: command-line arguments of the module.
        environment: variables that are set in addition to those of this process.
        takes_input: true if `stdin` is a pipe; otherwise standard input is empty.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        takes_input: bool = False,
    ) -> None:
        # A file rather than a pipe, since a full pipe that nobody reads would block the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # The process must import the same diffdeploy, even when it runs from a source tree.
        package_root = str(Path(diffdeploy.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            # -P: a file in the current folder must not shadow a module of the library.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE if takes_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": search_path, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()  # closes its input, which ends a worker that waits for more
        self._log.close()

    @property
    def stdin(self) -> IO[bytes]:
        """Pipe to the standard input of the process."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> BufferedIOBase:
        """Pipe from the standard output of the process."""
        assert isinstance(self._process.stdout, BufferedIOBase)
        return self._process.stdout

    def wait(self) -> int:
        """Wait for the process to end and return its exit status."""
        return self._process.wait()

    def said(self) -> list[str]:
        """Wait for the process to end and return the lines that it wrote to standard error."""
        self.wait()
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip().splitlines()

    def obituary(self) -> str:
        """Wait for the process to end; return how it ended and the last line that it wrote to standard error."""
        status, said = self.wait(), self.said()
        how = f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}{_named(-status)}"
        return how + (f": {said[-1]}" if said else "")


def _named(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal, which has no name
        return ""
