"""``diffdeploy export --format all``: every format that this machine can make, from one reading, in one table."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.jobs import Job, Outcome
from diffdeploy.errors import DiffDeployError, InputError, VerificationError

if TYPE_CHECKING:
    from diffdeploy.bench import BenchReport
    from diffdeploy.bench.startup import Startup
    from diffdeploy.checkpoints import Checkpoint
    from diffdeploy.exporters import ExportOptions

__all__ = ["export_formats"]

_LENGTHS = (128, 1024)
_EAGER = "two_call"
_ROUNDS = 15


@dataclass
class _Entry:
    """One format: what became of it."""

    name: str
    left_out: str | None = None
    outcome: Outcome | None = None
    failure: DiffDeployError | None = None
    startup: "Startup | None" = None

    @property
    def verdict(self) -> str:
        if self.left_out is not None:
            return "left out"
        if self.failure is not None or self.outcome is None or self.outcome.rejected is not None:
            return "failed"
        return "passed" if self.outcome.report is not None else "unverified"

    @property
    def bundle(self) -> Path | None:
        """Where it is, if it was made."""
        return None if self.outcome is None or self.outcome.export is None else self.outcome.target

    @property
    def why(self) -> str | None:
        rejected = None if self.outcome is None else self.outcome.rejected
        problem = self.failure or rejected
        return self.left_out if problem is None else str(problem)

    @property
    def exit_code(self) -> int:
        if self.failure is not None:
            return self.failure.exit_code
        return VerificationError.exit_code if self.verdict == "failed" else 0


def export_formats(job: Job, output: Path | None, *, as_json: bool) -> int:
    """Export all formats, measure those that passed, and print one table.

    Returns:
        The exit code of the worst.
    """
    from diffdeploy.bundle import default_output

    with console.activity("reading the checkpoint") as activity:
        found = job.read()
        parent = output or default_output(job.name, found.layer, "all")
        entries = [
            _export(replace(job, options=options), found, name, parent / name, activity)
            for name, options in _variants(job.options).items()
        ]
        made = [entry for entry in entries if entry.bundle is not None and entry.verdict == "passed"]
        for entry in made:
            activity.stage(f"starting {entry.name} in a fresh process")
            entry.startup = _startup(entry, job.options)
        activity.stage("measuring")
        measured = _measure(job, found, made) if made else None
    if as_json:
        console.print_json(_fields(entries, measured, parent))
    else:
        _print(entries, measured)
    for entry in entries:
        if entry.verdict in ("failed", "left out"):
            say = console.fail if entry.verdict == "failed" else console.note
            say(f"{entry.name}: {entry.why}")
    return max(entry.exit_code for entry in entries)


def _variants(options: "ExportOptions") -> "dict[str, ExportOptions]":
    """By name, what each format is asked for; options that only ONNX has stay with ONNX."""
    from diffdeploy.exporters.base import FORMATS

    variants = {name: replace(options, format=name, opset=None, onnx_flavor=None, reference=False) for name in FORMATS}
    variants["onnx"] = replace(options, format="onnx")
    return {"onnx": variants.pop("onnx"), "onnx-ort": replace(options, format="onnx", onnx_flavor="ort"), **variants}


def _export(job: Job, found: "Checkpoint", name: str, target: Path, activity: console.Activity) -> _Entry:
    """One format; what it cannot hold or this machine cannot make is left out, and said."""
    from diffdeploy.exporters import why_not_export
    from diffdeploy.runtime import why_not_run

    options = job.options
    reason = why_not_export(options.format, options.target_device, options.dtype)
    if reason is None and job.verify:
        reason = why_not_run(options.format, options.target_device, options.dtype, reference=options.reference)
    if reason is not None:
        return _Entry(name, left_out=reason)
    console.note(f"exporting {name}")
    try:
        return _Entry(name, outcome=job.export(found, target, activity))
    except DiffDeployError as error:
        # Not every block and graph can be had in onnxruntime's own operators.
        if name == "onnx-ort" and isinstance(error, InputError):
            return _Entry(name, left_out=str(error))
        return _Entry(name, failure=error)


def _startup(entry: _Entry, options: "ExportOptions") -> "Startup":
    from diffdeploy.bench.startup import measure_startup

    assert entry.bundle is not None
    return measure_startup(entry.bundle, options.device)


def _measure(job: Job, found: "Checkpoint", made: list[_Entry]) -> "BenchReport | None":
    """Latencies at two lengths, eager and all bundles in turns."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    from diffdeploy.bench import Bench, Candidate, Plan, Size
    from diffdeploy.bench.subject import Subject
    from diffdeploy.exporters.base import cast_weights

    options = job.options
    cached = options.graph == "cached"
    lengths = sorted({min(length, options.max_sequence_length - cached) for length in _LENGTHS})
    with tempfile.TemporaryDirectory(prefix="diffdeploy-") as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(cast_weights(found, options.dtype), weights)
        bundles = [
            Candidate(name=f"{entry.name} bundle", format=entry.name, bundle=entry.bundle, bundle_impl="padded")
            for entry in made
        ]
        plan = Plan(
            config=found.config,
            weights=weights,
            graph=options.graph,
            dtype=options.dtype,
            device=options.device or "cpu",
            threads=torch.get_num_threads(),
            sizes=tuple(
                Size(
                    batch_size=1,
                    sequence_length=1 if cached else length,
                    past_sequence_length=length if cached else 0,
                )
                for length in lengths
            ),
            candidates=(Candidate.of_impl(_EAGER), *bundles),
            baseline=_EAGER,
            rounds=_ROUNDS,
        )
        bench = Bench(plan, Subject(found, (), job.name, ()).block, "diffdeploy export --format all")
        bench.measure(lambda _text, _seconds: None)
        return bench.report()


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


def _fields(entries: list[_Entry], measured: "BenchReport | None", parent: Path) -> dict[str, Any]:
    """For JSON."""
    formats = []
    for entry in entries:
        outcome = None if entry.outcome is None else entry.outcome.fields
        formats.append(
            {
                "name": entry.name,
                "status": entry.verdict.replace(" ", "_"),
                "why": entry.why,
                "bundle": None if entry.bundle is None else str(entry.bundle),
                "size_bytes": None if entry.bundle is None else _size_bytes(entry.bundle),
                "verification": None if outcome is None else outcome["verification"],
                "startup": None if entry.startup is None else entry.startup.model_dump(),
                "latencies": _latencies(f"{entry.name} bundle", measured),
            }
        )
    verdicts = {entry.verdict for entry in entries}
    status = "failed" if "failed" in verdicts else "unverified" if "unverified" in verdicts else "passed"
    eager = {"name": f"eager {_EAGER}", "latencies": _latencies(_EAGER, measured)}
    return {"status": status, "output": str(parent), "formats": formats, "eager": eager}


def _print(entries: list[_Entry], measured: "BenchReport | None") -> None:
    """One table on standard output: what was made, how right it is, how large, and how fast."""
    sizes = [] if measured is None else measured.sizes
    headings = ("format", "verdict", "budget used", "MiB", "load s", *(f"{size.id} ms" for size in sizes))
    rows = [_row(entry, measured) for entry in entries if entry.verdict != "left out"]
    if measured is not None:
        rows.append([f"eager {_EAGER}", "", "", "", "", *_cells(_EAGER, measured)])
    console.print_table(headings, rows)
    if measured is not None:
        console.print_text(
            f"latency in brackets as a ratio to eager {_EAGER}, measured in turns, {measured.environment.threads} "
            "threads; load and first call in a fresh process, imports apart"
        )


def _row(entry: _Entry, measured: "BenchReport | None") -> list[str]:
    report = None if entry.outcome is None else entry.outcome.report
    worst = None if report is None else report.worst
    used = "-" if worst is None or worst.budget_used is None else f"{worst.budget_used:.0%}"
    size = "-" if entry.bundle is None else f"{_size_bytes(entry.bundle) / 2**20:.1f}"
    start = entry.startup
    load = "-" if start is None else f"{start.load_seconds + start.first_call_seconds:.2f}"
    cells = [] if measured is None else _cells(f"{entry.name} bundle", measured) or ["-"] * len(measured.sizes)
    return [entry.name, entry.verdict, used, size, load, *cells]


def _cells(name: str, measured: "BenchReport") -> list[str]:
    return [
        row["status"] if row["latency_ms"] is None else f"{row['latency_ms']:.3g} ({row['ratio']:.2f})"
        for row in _latencies(name, measured)
    ]
