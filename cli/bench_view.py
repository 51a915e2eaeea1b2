"""Output of ``diffdeploy bench``: a table per size, a legend, and the changes since an earlier run."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console

if TYPE_CHECKING:
    from diffdeploy.bench import BenchReport, Change

__all__ = ["change_fields", "json_fields", "print_bench", "print_changes"]


def json_fields(report: "BenchReport", changes: "Sequence[Change[Any]] | None") -> dict[str, Any]:
    """The report, with ``changes`` if it was compared."""
    if changes is None:
        return report.fields()
    return {**report.fields(), "changes": change_fields(changes)}


def change_fields(changes: "Sequence[Change[Any]]") -> list[dict[str, Any]]:
    """Changes for JSON."""
    return [
        {
            "name": change.new.name,
            **change.new.size.model_dump(),
            # The new row is among the results, and the old one is in the file of the earlier run.
            **{name: value for name, value in asdict(change).items() if name not in ("old", "new")},
        }
        for change in changes
    ]


def print_bench(report: "BenchReport") -> None:
    """Print the result to standard output as tables."""
    from diffdeploy.bench.table import HEADINGS, describe_size, figures, legend, machine

    for size in report.sizes:
        rows = [figures(row) for row in report.rows_of(size)]
        console.print_figures(describe_size(report, size), HEADINGS, rows)
    for row in report.results:
        if row.status == "wrong":
            console.print_text(f"{row.name} is wrong at {row.size.id} and was not timed there: {row.reason}")
    console.print_rows([*machine(report), *legend(report.baseline)])


def print_changes(changes: "Sequence[Change[Any]]") -> None:
    """Print the changes to standard output, and mark those that exceed the noise."""
    headings = ("candidate", "size", "old ratio", "new ratio", "change", "latency", "peak", "")
    rows = [
        [
            change.new.name,
            change.new.size.id,
            "-" if change.old.ratio is None else f"{change.old.ratio:.3f}",
            "-" if change.new.ratio is None else f"{change.new.ratio:.3f}",
            _percent(change.ratio_change),
            _percent(change.latency_change),
            _percent(change.peak_change),
            "changed" if change.significant else "",
        ]
        for change in changes
    ]
    console.print_text("")
    console.print_figures("since the earlier run", headings, rows)
    significant = sum(change.significant for change in changes)
    console.print_text(
        f"{significant} of {len(changes)} changed beyond the noise: by more than 5 %, with 95 % confidence intervals "
        "that do not overlap"
    )


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{change:+.1%}"
