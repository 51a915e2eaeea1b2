"""A measuring process, whose output is read line by line, and which ends with its ``with`` block."""

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from diffdeploy import errors
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.processes import WorkerProcess

__all__ = ["MeasuringProcess"]


class MeasuringProcess:
    """A running worker, such as `diffdeploy.bench.worker`. It is a context manager that ends the worker.

    Args:
        arguments: arguments of the worker.
        threads: number of OpenMP threads, which must be known when OpenMP is loaded.
        environment: additional environment variables.
        module: module of the worker.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        threads: int,
        environment: Mapping[str, str] | None = None,
        module: str = "diffdeploy.bench.worker",
    ) -> None:
        self._name = " ".join(arguments[::2])  # without the plan file
        self._process = WorkerProcess(
            module,
            arguments,
            environment={"OMP_NUM_THREADS": str(threads), **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, traceback)

    def events(self) -> Iterator[dict[str, Any]]:
        """Events of the process, until it ends.

        Raises:
            DiffDeployError: the process ended with an error, whose class is preserved.
        """
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                # The class is preserved, so that the command ends with the same exit code as in a single process.
                kind: type[DiffDeployError] = getattr(errors, event["kind"], ExportError)
                raise kind(event["message"])
            yield event
        # A worker that was killed, for example because it used too much memory, sends no event.
        if self._process.wait():
            raise ExportError(f"the measuring process ({self._name}) {self._process.obituary()}")
