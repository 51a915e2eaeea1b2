"""A measuring process: started, listened to line by line, and ended with its block."""

import json
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from diffdeploy import errors
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.processes import WorkerProcess

__all__ = ["MeasuringProcess"]


class MeasuringProcess:
    """A worker that runs, such as `diffdeploy.bench.worker`. Use it as a context manager; leaving the block ends it.

    Args:
        arguments: of the worker.
        threads: of OpenMP, which has to know them when it is loaded.
        environment: more variables.
        module: of the worker.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        threads: int,
        environment: Mapping[str, str] | None = None,
        module: str = "diffdeploy.bench.worker",
    ) -> None:
        self._name = " ".join(arguments[::2])  # without the file of the plan
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
        """What it says, until it ends.

        Raises:
            DiffDeployError: it ended with an error; of the class that it had there.
        """
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                # So that an error ends the command with the exit code that it would have in one process.
                kind: type[DiffDeployError] = getattr(errors, event["kind"], ExportError)
                raise kind(event["message"])
            yield event
        # A worker that was killed, by the system for its memory for example, sends no event.
        if self._process.wait():
            raise ExportError(f"the process that measures ({self._name}) {self._process.obituary()}")
