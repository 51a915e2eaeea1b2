"""What benchmarks of blocks and of models share: the events of measuring processes, and the forms of rows."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from diffdeploy.bench.machine import Machine

__all__ = ["Collected", "Key", "Status", "csv_text", "fastest_first"]

Key = tuple[str, str]  # a size's id and a candidate's name
Status = Literal["measured", "wrong", "interrupted"]


class _Row(Protocol):
    @property
    def latency_ms(self) -> float | None: ...

    @property
    def status(self) -> str: ...


R = TypeVar("R", bound=_Row)


class Collected:
    """What the processes of one run have said so far; an interrupted run keeps it."""

    def __init__(self) -> None:
        self._environment: Machine | None = None
        # Milliseconds.
        self._samples: dict[Key, list[float]] = defaultdict(list)
        self._verdicts: dict[Key, dict[str, Any]] = {}
        self._finished = False

    def _take(self, event: dict[str, Any]) -> None:
        """Keep what a process has measured."""
        match event["event"]:
            case "environment":
                self._environment = Machine.model_validate(event["environment"])
            # A worker sends the environment first; what comes without it has no run to belong to.
            case "machine" if self._environment is not None:
                self._environment = self._environment.updated(event["other_load"], event["matmul_gflop_per_second"])
            case "verdict":
                self._verdicts[event["size"], event["name"]] = event
            case "sample":
                self._samples[event["size"], event["name"]].append(event["latency_ms"])

    def _status(self, rows: Iterable[_Row]) -> Status:
        # What was interrupted is not called wrong: the rest might have been right.
        if not self._finished:
            return "interrupted"
        return "wrong" if any(row.status == "wrong" for row in rows) else "measured"


def fastest_first(rows: Iterable[R]) -> list[R]:
    """Rows by their latency; those without one keep their order at the end."""
    return sorted(rows, key=lambda row: float("inf") if row.latency_ms is None else row.latency_ms)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A line of names, and one for each row."""
    stream = io.StringIO()
    # The csv module ends lines as DOS does, unless told otherwise.
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
