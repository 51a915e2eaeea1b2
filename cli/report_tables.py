"""The tables of a verification and of a self-test, on standard error."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffdeploy.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from diffdeploy.locate import Finding
    from diffdeploy.selftest import Family, FaultResult
    from diffdeploy.verify import CaseReport, OutputReport, Report

__all__ = ["print_families", "print_faults", "print_report"]


def print_report(report: "Report") -> None:
    """The tables of a verification, on standard error: the contract, the cases by what they try, and what failed."""
    _print(_contract_table(report))
    if report.cases:
        _print(_case_table(report))
    if report.coverage:
        _print(_coverage_table(report))
    failed = [(case.id, output) for case in report.cases for output in case.outputs if not output.passed]
    if failed:
        _print(_failure_table(failed))
    if report.guilty is not None:
        _print(_stage_table(report.guilty))
    if report.loss is not None:
        console.note(f"loss by quantised weights: {report.loss.summary}")


def print_faults(faults: "Sequence[FaultResult]") -> None:
    """The table of a self-test on standard error: each fault, what caught it, and the stage that was named."""
    table = _table(("fault", "", "caught by", "stage", "named"), ())
    for fault in faults:
        named = "-" if fault.located is None else _mark(fault.located, fault.stage or "none")
        table.add_row(
            fault.name,
            _mark(fault.caught, "caught", "NOT SEEN") if fault.provable or fault.caught else "cannot be proved",
            ", ".join(fault.by),
            fault.expected_stage or "-",
            named,
        )
    _print(table)


def print_families(families: "Sequence[Family]") -> None:
    """Faults put in and caught, by kind, on standard error."""
    table = _table(("family", ""), ("put in", "caught"))
    for family in families:
        said = _mark(family.caught == family.injected, "all", "NOT ALL") if family.provable else "cannot be proved"
        table.add_row(family.name, said, str(family.injected), str(family.caught))
    _print(table)


def _mark(passed: bool, fine: str = "ok", wrong: str | None = None) -> str:
    return f"[green]{fine}[/green]" if passed else f"[red]{wrong or fine}[/red]"


def _contract_table(report: "Report") -> "Table":
    table = _table(("check", "", "what was found"), ())
    for check in report.contract:
        table.add_row(console.cell(check.name), _mark(check.passed, wrong="FAILED"), console.cell(check.detail))
    return table


def _case_table(report: "Report") -> "Table":
    table = _table(("inputs", "", "worst case"), ("cases", "rmse", "eager", "budget", "smallest k"))
    groups: dict[str, list[CaseReport]] = {}
    for case in report.cases:
        groups.setdefault(case.group, []).append(case)
    for group, cases in groups.items():
        # By severity, as some cases have no number to compare.
        worst = max(cases, key=lambda case: case.severity)
        table.add_row(
            console.cell(group),
            _mark(all(case.passed for case in cases), wrong="FAILED"),
            console.cell(worst.id),
            str(len(cases)),
            _number(worst.rmse),
            _number(worst.eager_rmse),
            "-" if worst.budget_used is None else f"{worst.budget_used:.0%}",
            _number(worst.smallest_k),
        )
    return table


def _coverage_table(report: "Report") -> "Table":
    table = _table(("range", "declared", "compared whole", "compared in part", "not tried"), ("sizes",))
    for part in report.coverage:
        ranges = (part.declared, part.compared_whole, part.compared_in_part)
        said = ["-" if found is None else f"{found.min} to {found.max}" for found in ranges]
        untried = "-" if part.untried_text is None else part.untried_text.removeprefix(f"{part.axis} ")
        table.add_row(console.cell(part.axis), *said, console.cell(untried), str(part.num_sizes))
    return table


def _failure_table(failed: "Sequence[tuple[str, OutputReport]]") -> "Table":
    table = _table(("failed", "output", "why"), ("max error", "allowed", "eager"))
    for case_id, output in failed:
        why = output.reason if output.worst_index is None else f"largest error at {output.worst_index}"
        figures = (output.max_error, output.allowed_max_error, output.eager_max_error)
        table.add_row(*map(console.cell, (case_id, output.output, str(why))), *map(_number, figures))
    return table


def _stage_table(finding: "Finding") -> "Table":
    """Where a failed artifact goes wrong: all stages that it shows, or the one sentence that there is."""
    table = _table(("stage", "", "where"), ("error", "eager", "times"))
    for stage in finding.stages:
        figures = (stage.rmse, stage.eager_rmse, stage.amplification)
        found = _mark(not stage.deviates, wrong="WRONG")
        table.add_row(stage.stage, found, console.cell(stage.node or "-"), *map(_number, figures))
    if not finding.stages:
        table.add_row(finding.stage or "not found", "", console.cell(finding.detail), "-", "-", "-")
    return table


def _table(words: Sequence[str], numbers: Sequence[str]) -> "Table":
    """Columns of words on the left, of numbers on the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        # Seven characters hold figures such as 1.2e-05, whatever the words beside them take.
        table.add_column(heading, justify="right", no_wrap=True, min_width=min(7, len(heading)))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _print(table: "Table") -> None:
    if not console.is_quiet():
        console.print_whole(table, console.standard_error())
