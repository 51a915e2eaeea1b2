"""Fresh Python processes that run one module of diffdeploy, and what they said if they died."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import diffdeploy

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """A process that runs ``python -m module``. It ends with the ``with`` block: killed if that fails, else waited for.

    Args:
        module: dotted name of a module of diffdeploy.
        arguments: command-line arguments of the module.
        environment: variables that are set in addition to those of this process.
        takes_input: whether `stdin` is a pipe; otherwise it is empty.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        takes_input: bool = False,
    ) -> None:
        # A file, not a pipe: one that nobody reads would stop the process when it is full.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # The same diffdeploy must run there, also where it is imported from a source tree.
        package_root = str(Path(diffdeploy.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            # -P: a file in the current folder must not stand in for a module of the library.
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
        """Pipe to its standard input."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Pipe from its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout

    def wait(self) -> int:
        """Wait until it has ended; returns its exit status."""
        return self._process.wait()

    def said(self) -> list[str]:
        """Wait until it has ended; returns the lines that it wrote to standard error."""
        self.wait()
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip().splitlines()

    def obituary(self) -> str:
        """Wait until it has ended; returns how, and the last line that it wrote to standard error."""
        status, said = self.wait(), self.said()
        how = f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}{_named(-status)}"
        return how + (f": {said[-1]}" if said else "")


def _named(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal, which has no name
        return ""
