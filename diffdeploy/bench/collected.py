"""Common parts of benchmarks of blocks and of models: the events of measuring processes, and the formatting of rows."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from diffdeploy.bench.machine import Machine

__all__ = ["Collected", "Key", "Status", "csv_text", "fastest_first"]

Key = tuple[str, str]  # the id of a size, and the name of a candidate
Status = Literal["measured", "wrong", "interrupted"]


class _Row(Protocol):
    @property
    def latency_ms(self) -> float | None: ...

    @property
    def status(self) -> str: ...


R = TypeVar("R", bound=_Row)


class Collected:
    """Events of the processes of one run, which are kept if the run is interrupted."""

    def __init__(self) -> None:
        self._environment: Machine | None = None
        # In milliseconds.
        self._samples: dict[Key, list[float]] = defaultdict(list)
        self._verdicts: dict[Key, dict[str, Any]] = {}
        self._finished = False

    def _take(self, event: dict[str, Any]) -> None:
        """Store an event of a process."""
        match event["event"]:
            case "environment":
                self._environment = Machine.model_validate(event["environment"])
            # A worker sends the environment first; without it, events belong to no run.
            case "machine" if self._environment is not None:
                self._environment = self._environment.updated(event["other_load"], event["matmul_gflop_per_second"])
            case "verdict":
                self._verdicts[event["size"], event["name"]] = event
            case "sample":
                self._samples[event["size"], event["name"]].append(event["latency_ms"])

    def _status(self, rows: Iterable[_Row]) -> Status:
        # A run that did not finish is reported as interrupted, even if a candidate is wrong.
        if not self._finished:
            return "interrupted"
        return "wrong" if any(row.status == "wrong" for row in rows) else "measured"


def fastest_first(rows: Iterable[R]) -> list[R]:
    """Sort rows by latency; those without one keep their order at the end."""
    return sorted(rows, key=lambda row: float("inf") if row.latency_ms is None else row.latency_ms)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format a line of column names, and one line per row."""
    stream = io.StringIO()
    # The default of the csv module is the line ending of DOS.
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
