"""``diffdeploy verify --engine``: checks that a third-party engine computes what the weights define."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.junit import of_cases
from diffdeploy.cli.progress import activity
from diffdeploy.cli.report_files import ReportFiles
from diffdeploy.errors import InputError, VerificationError

if TYPE_CHECKING:
    from diffdeploy.engines.verification import EngineReport

__all__ = ["run_engine"]


def run_engine(
    path: Path | None,
    name: str,
    tensor_parallel_size: int | None,
    seed: int | None,
    files: ReportFiles,
    *,
    as_json: bool,
    warn_only: bool,
) -> int:
    """Verify a model on an engine, print the verdict, and return the exit code."""
    if path is None:
        raise InputError("no model was given; give the directory of a model")
    from diffdeploy.engines import require_engine

    engine = require_engine(name)
    files.check()
    # Checked before torch is loaded.
    engine.require_usable()
    with activity(f"opening {path}") as doing:
        from diffdeploy.engines.verification import verify_engine

        report = verify_engine(
            path, engine, tensor_parallel_size=tensor_parallel_size or 1, seed=seed or 0, phase=doing.phase
        )
    properties = {"engine": f"{report.engine} {report.version}", "dtype": report.dtype, "seed": str(report.seed)}
    files.write_junit(path, properties, of_cases(report.cases))
    return _finish(report, path, as_json=as_json, warn_only=warn_only)


def _finish(report: "EngineReport", path: Path, *, as_json: bool, warn_only: bool) -> int:
    error = _failure(report, path)
    if error is not None:
        (console.warn if warn_only else console.fail)(error)
    if as_json:
        console.print_json({**_fields(report, path), **({} if error is None else {"error": error})})
    elif warn_only or error is None:
        console.print_text(_verdict(report, path))
    return 0 if warn_only or error is None else VerificationError.exit_code


def _failure(report: "EngineReport", path: Path) -> str | None:
    failed = [case for case in report.cases if not case.passed]
    if not failed:
        return None
    first = failed[0]
    what = next(output for output in first.outputs if not output.passed)
    return (
        f"{report.engine} {report.version} does not compute what {path} defines: {len(failed)} of {len(report.cases)} "
        f"cases failed, first {first.id}: {what.failure}"
    )


def _verdict(report: "EngineReport", path: Path) -> str:
    worst = report.worst
    share = "" if worst is None else f"; worst {worst.id} used {console.share(worst.budget_used)} of its error budget"
    ranks = f", tensor parallel {report.tensor_parallel_size}" if report.tensor_parallel_size > 1 else ""
    return (
        f"{'passed' if report.passed else 'failed'}: {path} on {report.engine} {report.version}, {report.dtype}{ranks} "
        f"({len(report.cases)} cases; {report.num_tokens_checked} of {report.num_tokens} greedy tokens have a "
        f"sufficient margin{share})"
    )


def _fields(report: "EngineReport", path: Path) -> dict[str, Any]:
    """Fields for JSON."""
    worst = report.worst
    return {
        "status": "passed" if report.passed else "failed",
        "engine": report.engine,
        "model": str(path),
        "verification": {
            "passed": report.passed,
            "num_cases": len(report.cases),
            "worst": None if worst is None else {"case": worst.id, "budget_used": worst.budget_used},
            **report.model_dump(mode="json", exclude={"engine", "model", "schema_version"}),
        },
    }
