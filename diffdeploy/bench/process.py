"""A measuring process: started, listened to line by line, and ended with its block."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import diffdeploy
from diffdeploy import errors
from diffdeploy.errors import DiffDeployError, ExportError

__all__ = ["MeasuringProcess"]


class MeasuringProcess:
    """A `diffdeploy.bench.worker` that runs. Use it as a context manager; leaving the block kills it.

    Args:
        arguments: of the worker.
        threads: of OpenMP, which has to know them when it is loaded.
        environment: more variables.
    """

    def __init__(self, arguments: list[str], *, threads: int, environment: Mapping[str, str] | None = None) -> None:
        self._name = " ".join(arguments[::2])  # without the file of the plan
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        package_root = str(Path(diffdeploy.__file__).parents[1])
        search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "diffdeploy.bench.worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": str(threads), **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends.

        Raises:
            DiffDeployError: it ended with an error; of the class that it had there.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                kind: type[DiffDeployError] = getattr(errors, event["kind"], ExportError)
                raise kind(event["message"])
            yield event
        if code := self._process.wait():
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            last = f": {said[-1]}" if said else ""
            raise ExportError(f"the process that measures ({self._name}) ended with status {code}{last}")
