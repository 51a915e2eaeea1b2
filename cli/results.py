"""How ``export`` and ``verify`` end: the table, the verdict or its JSON, and the exit code."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.errors import VerificationError

if TYPE_CHECKING:
    from diffdeploy.verify import Report

__all__ = ["finish", "report_fields"]


def finish(report: "Report", bundle: Path, *, as_json: bool, error: str | None = None) -> int:
    """Print a report, as JSON on standard output if wanted, and the error if there is one.

    Returns:
        The exit code.
    """
    console.print_report(report)
    if as_json:
        console.print_json({**report_fields(report, bundle), **({} if error is None else {"error": error})})
    elif error is None:
        console.print_verdict(report, bundle)
    if error is None:
        return 0
    console.fail(error)
    return VerificationError.exit_code


def report_fields(report: "Report", bundle: Path) -> dict[str, Any]:
    """Status, bundle, graph and verdict of a report; ``budget_used`` is ``null`` where an output had no number."""
    worst = report.worst
    return {
        "status": "passed" if report.passed else "failed",
        "format": report.format,
        "bundle": str(bundle),
        "graph": report.graph.model_dump(),
        "verification": {
            "passed": report.passed,
            "num_cases": len(report.cases),
            "worst": None if worst is None else {"case": worst.id, "budget_used": worst.budget_used},
            "backend": report.backend,
            "seed": report.seed,
            "contract": [check.model_dump() for check in report.contract],
            "cases": [case.model_dump() for case in report.cases],
        },
    }
