"""``diffdeploy export --format all``: reads a checkpoint once, exports every supported format, and prints one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.export_job import Job
from diffdeploy.cli.interrupts import kept_sentence
from diffdeploy.cli.progress import activity
from diffdeploy.cli.report_output import report_fields

if TYPE_CHECKING:
    from diffdeploy.bench import BenchReport
    from diffdeploy.bench.every_format import FormatResult

__all__ = ["export_formats"]


def export_formats(job: Job, output: Path | None, *, as_json: bool) -> int:
    """Export all formats, measure those that passed, and print one table.

    Returns:
        The highest exit code of all formats.
    """
    # Imported here, as in all commands, since it imports torch, which --help must not wait for.
    from diffdeploy.bench.every_format import FormatResult, export_every_format, measure_formats
    from diffdeploy.bundle import default_output
    from diffdeploy.checkpoints import Checkpoint

    results: list[FormatResult] = []
    measured, interrupted = None, False
    with activity("reading the checkpoint") as doing:
        found = job.read()
        assert isinstance(found, Checkpoint)  # `export` refuses a model
        job = job.settled(found)
        parent = output or default_output(job.name, found.layer, "all")

        def finished(result: FormatResult) -> None:
            results.append(result)
            doing.end()
            console.note(_verdict(result))

        try:
            export_every_format(
                found,
                parent,
                job.options,
                force=job.force,
                verify=job.verify,
                phase=doing.phase,
                progress=doing.progress,
                finished=finished,
            )
            doing.phase("measuring")
            measured = measure_formats(found, results, job.options, job.name)
        except KeyboardInterrupt:
            interrupted = True
            doing.abandon()
    if as_json:
        console.print_json(_fields(results, measured, parent, interrupted=interrupted))
    elif results:
        _print(results, measured)
    for result in results:
        # Printed below the table, where users look first in a terminal.
        if result.verdict in ("failed", "left out"):
            say = console.fail if result.verdict == "failed" else console.note
            say(f"{result.name}: {result.why}")
    if interrupted:
        kept = [result.bundle for result in results if result.bundle is not None]
        console.fail(f"interrupted; {kept_sentence(kept)}")
        # The finished formats have been printed, even with --json.
        raise console.Ended(console.INTERRUPTED)
    return max(result.exit_code for result in results)


def _verdict(result: "FormatResult") -> str:
    """Format the verdict on one format as a line for the log."""
    used = _budget_used(result)
    place = "" if result.bundle is None else f": {result.bundle}"
    cases = "" if result.report is None else f" ({len(result.report.cases)} cases; worst used {used} of its budget)"
    return f"{result.name} {result.verdict}{place}{cases}"


def _budget_used(result: "FormatResult") -> str:
    worst = None if result.report is None else result.report.worst
    return console.share(None if worst is None else worst.budget_used)


def _size_bytes(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def _latencies(name: str, measured: "BenchReport | None") -> list[dict[str, Any]]:
    rows = [] if measured is None else [row for row in measured.results if row.name == name]
    return [
        {
            **row.size.model_dump(),
            "status": row.status,
            "latency_ms": row.latency_ms,
            "ratio": row.ratio,
        }
        for row in rows
    ]


def _fields(
    results: "list[FormatResult]", measured: "BenchReport | None", parent: Path, *, interrupted: bool
) -> dict[str, Any]:
    """Fields for JSON."""
    from diffdeploy.bench.every_format import EAGER

    formats = [
        {
            "name": result.name,
            "status": result.verdict.replace(" ", "_"),
            "why": result.why,
            "bundle": None if result.bundle is None else str(result.bundle),
            "size_bytes": None if result.bundle is None else _size_bytes(result.bundle),
            "verification": _verification(result),
            "startup": None if result.startup is None else result.startup.model_dump(),
            # Named as in `measure_formats`, since flash2 is both a format and an implementation.
            "latencies": _latencies(f"{result.name} bundle", measured),
        }
        for result in results
    ]
    verdicts = {result.verdict for result in results}
    # A format that was left out cannot be exported here, which is not a failure.
    status = "failed" if "failed" in verdicts else "unverified" if "unverified" in verdicts else "passed"
    status = "interrupted" if interrupted else status
    eager = {"name": f"eager {EAGER}", "latencies": _latencies(EAGER, measured)}
    return {"status": status, "output": str(parent), "formats": formats, "eager": eager}


def _verification(result: "FormatResult") -> Any:
    if result.report is not None:
        return report_fields(result.report, result.path)["verification"]
    return None if result.export is None else {"passed": False, "num_cases": 0, "worst": None}


def _print(results: "list[FormatResult]", measured: "BenchReport | None") -> None:
    """Print one table to standard output: the verdict, error, size and speed of each format."""
    from diffdeploy.bench.every_format import EAGER

    sizes = [] if measured is None else measured.sizes
    headings = ("format", "verdict", "budget used", "MiB", "load s", *(f"{size.id} ms" for size in sizes))
    rows = [_row(result, measured) for result in results if result.verdict != "left out"]
    if measured is not None:
        rows.append(["eager", "", "", "", "", *_cells(EAGER, measured)])
    console.print_figures("one block in every format", headings, rows)
    if measured is not None:
        console.print_text(
            f"ms: latency, with its ratio to eager ({EAGER}) in brackets; all candidates take turns on "
            f"{measured.environment.threads} threads; load s: time to load and make the first call in a fresh process, "
            "without imports"
        )


def _row(result: "FormatResult", measured: "BenchReport | None") -> list[str]:
    size = "-" if result.bundle is None else f"{_size_bytes(result.bundle) / 2**20:.1f}"
    start = result.startup
    # Import time is excluded, since it is the same for all formats that one package runs.
    load = "-" if start is None else f"{start.load_seconds + start.first_call_seconds:.2f}"
    # Only bundles that passed were measured.
    cells = [] if measured is None else _cells(f"{result.name} bundle", measured) or ["-"] * len(measured.sizes)
    return [result.name, result.verdict, _budget_used(result), size, load, *cells]


def _cells(name: str, measured: "BenchReport") -> list[str]:
    return [
        row["status"] if row["latency_ms"] is None else f"{row['latency_ms']:.3g} ({row['ratio']:.2f})"
        for row in _latencies(name, measured)
    ]
