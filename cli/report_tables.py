"""The tables of a verification and of a self-test, on standard error."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffdeploy.cli import console
from diffdeploy.errors import on_one_line

if TYPE_CHECKING:
    from rich.table import Table

    from diffdeploy.locate import Finding
    from diffdeploy.selftest import Family, FaultResult
    from diffdeploy.verify import CaseReport, OutputReport, Report

__all__ = ["allowance", "print_families", "print_faults", "print_report"]

# Minimum width of a terminal for all columns; narrower ones show the most important columns.
_WIDE = 110
_NARROW_NAME = 24
_BY_CHANCE = "detectable only by chance"


def print_report(report: "Report") -> None:
    """Print the tables of a verification to standard error: the contract, the cases by group, and the failures."""
    wide = _is_wide()
    _print(_contract_table(report))
    if report.cases:
        _print(_case_table(report, wide=wide))
    if report.coverage:
        _print(_coverage_table(report))
    failed = [(case.id, output) for case in report.cases for output in case.outputs if not output.passed]
    if failed:
        _print(_failure_table(failed, wide=wide))
    if report.guilty is not None:
        _print(_stage_table(report.guilty, wide=wide))
    if report.loss is not None:
        console.note(f"loss from quantised weights: {report.loss.summary}")


def print_faults(faults: "Sequence[FaultResult]") -> None:
    """Print the table of a self-test to standard error: each fault, what caught it, and the reported stage."""
    wide = _is_wide()
    table = _table(("fault", "", "caught by", "reported stage"), (), whole=("fault", "caught by"))
    for fault in faults:
        said = fault.stage or "none"
        named = "-" if fault.located is None else said if fault.located else f"{said}, not {fault.expected_stage}"
        table.add_row(
            _name(fault.name, wide=wide),
            _mark(fault.caught, "caught", "NOT SEEN") if fault.provable or fault.caught else _BY_CHANCE,
            _name(", ".join(fault.by), wide=wide),
            named if fault.located is None else _mark(fault.located, named),
        )
    _print(table)


def print_families(families: "Sequence[Family]") -> None:
    """Print the numbers of injected and caught faults by family to standard error."""
    table = _table(("family", ""), ("injected", "caught"))
    for family in families:
        said = _mark(family.caught == family.injected, "all", "NOT ALL") if family.provable else _BY_CHANCE
        table.add_row(family.name, said, str(family.injected), str(family.caught))
    _print(table)


def _mark(passed: bool, fine: str = "ok", wrong: str | None = None) -> str:
    return f"[green]{fine}[/green]" if passed else f"[red]{wrong or fine}[/red]"


def _contract_table(report: "Report") -> "Table":
    table = _table(("check", "", "what was found"), ())
    for check in report.contract:
        table.add_row(console.cell(check.name), _mark(check.passed, wrong="FAILED"), console.cell(check.detail))
    return table


def allowance(cases: "Sequence[CaseReport]") -> str:
    """What the allowed errors of some cases contain besides a factor and a floor; empty for nothing."""
    rounds = any(output.activation_rmse for case in cases for output in case.outputs)
    return " and an allowance for activations that are rounded to int8" if rounds else ""


def _case_table(report: "Report", *, wide: bool) -> "Table":
    numbers = ["cases", *(["rmse", "eager rmse"] if wide else []), "budget\nused", "k\nneeded"]
    table = _table(("inputs", "", "worst case"), numbers, whole=("worst case",))
    table.caption = (
        f"budget used: error divided by the allowed error, which is k = {report.budget.k:g} times the error of a "
        f"correct computation, plus a floor{allowance(report.cases)}\n"
        "k needed: the smallest k with which the case would pass"
    )
    groups: dict[str, list[CaseReport]] = {}
    for case in report.cases:
        groups.setdefault(case.group, []).append(case)
    for group, cases in groups.items():
        # Chosen by severity, since some cases have no number to compare.
        worst = max(cases, key=lambda case: case.severity)
        table.add_row(
            console.cell(group),
            _mark(all(case.passed for case in cases), wrong="FAILED"),
            _name(worst.id, wide=wide),
            str(len(cases)),
            *((_number(worst.rmse), _number(worst.eager_rmse)) if wide else ()),
            console.share(worst.budget_used),
            _number(worst.smallest_k),
        )
    return table


def _name(name: str, *, wide: bool) -> str:
    """The name of a case or a node, broken between its parts if there is little room."""
    if wide:
        return console.cell(name)
    lines = [""]
    for part in re.findall(r"[^-_ ]*[-_ ]?", on_one_line(name)):
        if lines[-1] and len(lines[-1] + part) > _NARROW_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(map(console.cell, lines))


def _coverage_table(report: "Report") -> "Table":
    words = ("range", "declared", "compared\nin full", "compared\nin part", "not tried")
    table = _table(words, ("sizes\nrun",), whole=("range", "declared"))
    for part in report.coverage:
        ranges = (part.declared, part.compared_whole, part.compared_in_part)
        said = ["-" if found is None else f"{found.min} to {found.max}" for found in ranges]
        untried = "-" if part.untried_text is None else part.untried_text.removeprefix(f"{part.axis} ")
        table.add_row(console.cell(part.axis), *said, console.cell(untried), str(part.num_sizes))
    return table


def _failure_table(failed: "Sequence[tuple[str, OutputReport]]", *, wide: bool) -> "Table":
    table = _table(("failed", "output", "why"), ("max\nerror", "allowed", "eager's\nerror"), whole=("failed", "output"))
    for case_id, output in failed:
        why = output.reason if output.worst_index is None else f"largest error at {output.worst_index}"
        figures = (output.max_error, output.allowed_max_error, output.eager_max_error)
        words = (_name(case_id, wide=wide), console.cell(output.output), console.cell(str(why)))
        table.add_row(*words, *map(_number, figures))
    return table


def _stage_table(finding: "Finding", *, wide: bool) -> "Table":
    """Table that locates a failure: all stages whose values the artifact exposes, or one sentence if there are none."""
    table = _table(("stage", "", "where"), ("rmse", "eager\nrmse", "ratio"), whole=("stage", "where"))
    for stage in finding.stages:
        figures = (stage.rmse, stage.eager_rmse, stage.amplification)
        found = _mark(not stage.deviates, wrong="WRONG")
        table.add_row(stage.stage, found, _name(stage.node or "-", wide=wide), *map(_number, figures))
    if not finding.stages:
        table.add_row(finding.stage or "not found", "", console.cell(finding.detail), "-", "-", "-")
    return table


def _table(words: Sequence[str], numbers: Sequence[str], *, whole: Sequence[str] = ()) -> "Table":
    """Columns of words on the left, of numbers on the right; columns in ``whole`` are not wrapped."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for heading in words:
        table.add_column(heading, overflow="fold", no_wrap=heading in whole)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _is_wide() -> bool:
    stderr = console.standard_error()
    return not stderr.is_terminal or stderr.width >= _WIDE


def _print(table: "Table") -> None:
    if not console.is_quiet():
        console.print_whole(table, console.standard_error())
