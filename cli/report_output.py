"""Final output of ``export`` and ``verify``: the table, the verdict or its JSON, and the exit code."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.report_tables import print_report
from diffdeploy.errors import VerificationError

if TYPE_CHECKING:
    from diffdeploy.formats import ArtifactFacts
    from diffdeploy.verify import Loss, Report

__all__ = ["finish", "graph_fields", "loss_fields", "report_fields"]


def finish(report: "Report", subject: Path, *, as_json: bool, error: str | None = None, warn_only: bool = False) -> int:
    """Print a report: what failed and what to do about it, the table, and the verdict or JSON on standard output.

    Args:
        report: report of a verification.
        subject: the bundle, or the report that was judged again.
        as_json: true to print JSON instead of the verdict.
        error: message about the failure; by default from `Report.first_failure`.
        warn_only: true to exit with 0 after a failure.

    Returns:
        The exit code.
    """
    failed = not report.passed
    if failed:
        error = error or f"{subject} failed verification: {report.first_failure()}; {_next_step(report, subject)}"
        (console.warn if warn_only else console.fail)(error)
    # On standard error, even with --json, since only the verdict is the result.
    print_report(report)
    if as_json:
        console.print_json({**report_fields(report, subject), **({"error": error} if failed else {})})
    elif warn_only or not failed:
        console.print_verdict(report, subject)
    return VerificationError.exit_code if failed and not warn_only else 0


def _next_step(report: "Report", subject: Path) -> str:
    """Command that shows more about a failure."""
    if not subject.is_dir():
        return "run diffdeploy verify on the bundle itself"
    if report.selection == "golden":
        return f"run diffdeploy verify {subject} for the whole sweep"
    if any(not case.passed for case in report.cases):
        return (
            f"diffdeploy verify {subject} --seed {report.seed} --save-inputs inputs.safetensors saves the inputs "
            "on which it fails"
        )
    return f"diffdeploy inspect {subject} shows what it was made from"


def report_fields(report: "Report", subject: Path) -> dict[str, Any]:
    """Status, bundle or report, graph and verdict; ``budget_used`` is ``null`` if no error was measured."""
    from diffdeploy.verify import num_judged_layers

    worst = report.worst
    layers = {"num_layers": num_judged_layers(report.cases)} if report.graph.num_layers else {}
    return {
        "status": "passed" if report.passed else "failed",
        "format": report.format,
        # With --from-report there may be no bundle on this machine.
        "bundle" if subject.is_dir() else "report": str(subject),
        "graph": graph_fields(report.graph),
        "verification": {
            "passed": report.passed,
            "num_cases": len(report.cases),
            **layers,
            "worst": None if worst is None else {"case": worst.id, "budget_used": worst.budget_used},
            # The excluded fields are elsewhere in the result, or describe how a report is stored.
            **report.model_dump(mode="json", exclude={"format", "graph", "schema_version", "loss"}),
        },
        # Outside `verification`, since the loss does not affect the verdict.
        **({} if report.loss is None else {"loss": loss_fields(report.loss)}),
    }


def loss_fields(loss: "Loss") -> dict[str, Any]:
    """Fields of the loss from quantised weights."""
    return {**loss.model_dump(mode="json"), "worst_layer": loss.worst_layer}


def graph_fields(facts: "ArtifactFacts") -> dict[str, Any]:
    """Facts about an artifact; for a model, including the number of layers."""
    fields = facts.model_dump()
    layers = {"num_layers": facts.num_layers} if facts.num_layers else {}
    return {"variant": fields.pop("variant"), **layers, **fields}
