"""All printing: results to standard output, everything else to standard error."""

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.errors import on_one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from diffdeploy.locate import Finding
    from diffdeploy.selftest import Family, FaultResult
    from diffdeploy.verify import CaseReport, OutputReport, Report

__all__ = [
    "INTERRUPTED",
    "Activity",
    "Ended",
    "activity",
    "fail",
    "note",
    "print_families",
    "print_faults",
    "print_figures",
    "print_json",
    "print_part",
    "print_report",
    "print_rows",
    "print_table",
    "print_text",
    "print_verdict",
    "warn",
]


# 128 and the number of SIGINT, as shells report it.
INTERRUPTED = 130


class Ended(Exception):  # noqa: N818 - how a command ends is no error by itself
    """Ends a command with an exit code.

    Args:
        code: exit code.
        message: the one sentence that is still to be said; ``None`` where the command has said all.
    """

    def __init__(self, code: int, message: str | None = None) -> None:
        super().__init__(code)
        self.code, self.message = code, message


def _stderr() -> "Console":
    from rich.console import Console

    # Rich would colour every number in a sentence.
    console = Console(stderr=True, highlight=False)
    # In a log file or a pipe there is no edge to fit into.
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=_LOG_WIDTH)


def print_json(fields: Any) -> None:
    """One JSON object on standard output."""
    # Not through rich, which would break lines and read brackets as markup. NaN is no JSON, and must not get out.
    sys.stdout.write(json.dumps(fields, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """A line of result on standard output."""
    # What files say may hold what a terminal obeys.
    sys.stdout.write(on_one_line(text) + "\n")
    sys.stdout.flush()


def print_part(text: str) -> None:
    """A part of a text on standard output, with its line ends and tabs."""
    # What a model says may hold what a terminal obeys, too, but also spaces and joiners that are not printable.
    obeyed = (letter not in "\n\t" and unicodedata.category(letter) == "Cc" for letter in text)
    sys.stdout.write("".join(repr(letter)[1:-1] if bad else letter for letter, bad in zip(text, obeyed, strict=True)))
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(on_one_line(text) + "\n")


def fail(message: str) -> None:
    """The one sentence that says what went wrong."""
    # Messages of other libraries have several lines; a log is searched line by line.
    note("error: " + " ".join(message.split()))


def warn(message: str) -> None:
    """What went wrong, where that is no error."""
    note("warning: " + " ".join(message.split()))


_LOG_WIDTH = 110
# Rich has no width without end; no table of ours is as wide as this.
_UNLIMITED = 10_000


class Activity:
    """What goes on now, shown on a terminal as one line that changes; `phase` and `progress` are its callbacks."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._began = 0.0

    def phase(self, text: str) -> None:
        """A phase of the work begins."""
        self._show(_cell(text))

    def progress(self, done: int, total: int, name: str) -> None:
        """A case begins."""
        self._show(_cell(f"verifying {done + 1}/{total} {name}"))

    def trial(self, done: int, total: int, name: str) -> None:
        """A fault is put in; they take about equally long."""
        # With the first fault: before it the bundle is verified as it is, which takes another time.
        self._began = self._began or time.monotonic()
        left = (time.monotonic() - self._began) / done * (total - done) if done else 0.0
        self._show(f"fault {done + 1}/{total} {name}" + (f", about {left:.0f} s left" if done else ""))


@contextmanager
def activity(text: str) -> Iterator[Activity]:
    """Show a spinner on standard error while the block runs; nothing when it is not a terminal."""
    console = _stderr()
    with console.status(text) as status:
        yield Activity(lambda line: status.update(line))


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns on standard output."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print_text(f"{name:<{width}}  {value}")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; in a pipe it is as wide as it needs to be."""
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(_cell, row))
    _print_whole(table)


def print_figures(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output with a title: names in the first column, figures in the others."""
    from rich import box
    from rich.table import Table

    print_text(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Folded, not cut: a name must be whole to be used.
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row))
    _print_whole(table)


def _cell(text: str) -> str:
    """A text as it is: for rich, which takes brackets for markup, and for a terminal."""
    from rich.markup import escape

    return escape(on_one_line(text))


def _print_whole(table: "Table") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    # Rich takes 80 columns where it finds no terminal. It measures a table within the width that it has, hence twice.
    if not console.is_terminal:
        console.width = _UNLIMITED
        console.width = console.measure(table).maximum
    console.print(table)


def print_report(report: "Report") -> None:
    """The tables of a verification, on standard error: the contract, the cases by what they try, and what failed."""
    console = _stderr()
    console.print(_contract_table(report))
    if report.cases:
        console.print(_case_table(report))
    if report.coverage:
        console.print(_coverage_table(report))
    failed = [(case.id, output) for case in report.cases for output in case.outputs if not output.passed]
    if failed:
        console.print(_failure_table(failed))
    if report.guilty is not None:
        console.print(_stage_table(report.guilty))
    if report.loss is not None:
        note(f"loss by quantised weights: {report.loss.summary}")


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
    _stderr().print(table)


def print_families(families: "Sequence[Family]") -> None:
    """Faults put in and caught, by kind, on standard error."""
    table = _table(("family", ""), ("put in", "caught"))
    for family in families:
        said = _mark(family.caught == family.injected, "all", "NOT ALL") if family.provable else "cannot be proved"
        table.add_row(family.name, said, str(family.injected), str(family.caught))
    _stderr().print(table)


def print_verdict(report: "Report", bundle: Path) -> None:
    """The verdict in one line on standard output."""
    worst = report.worst
    # Outputs that travel with a bundle are no proof of it: no contract was read, and no range was swept.
    fine, wrong = (
        ("golden vectors match", "golden vectors differ") if report.selection == "golden" else ("passed", "failed")
    )
    verdict = fine if report.passed else wrong
    share = ""
    if worst is not None and worst.budget_used is not None:
        share = f"worst {worst.id} used {worst.budget_used:.0%} of its error budget; "
    untried = "" if report.untried is None else f"; not tried: {report.untried}"
    print_text(f"{verdict}: {bundle} ({len(report.cases)} cases; {share}{report.backend}{untried})")


def _mark(passed: bool, fine: str = "ok", wrong: str | None = None) -> str:
    return f"[green]{fine}[/green]" if passed else f"[red]{wrong or fine}[/red]"


def _contract_table(report: "Report") -> "Table":
    table = _table(("check", "", "what was found"), ())
    for check in report.contract:
        table.add_row(_cell(check.name), _mark(check.passed, wrong="FAILED"), _cell(check.detail))
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
            _cell(group),
            _mark(all(case.passed for case in cases), wrong="FAILED"),
            _cell(worst.id),
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
        table.add_row(_cell(part.axis), *said, _cell(untried), str(part.num_sizes))
    return table


def _failure_table(failed: "Sequence[tuple[str, OutputReport]]") -> "Table":
    table = _table(("failed", "output", "why"), ("max error", "allowed", "eager"))
    for case_id, output in failed:
        why = output.reason if output.worst_index is None else f"largest error at {output.worst_index}"
        figures = (output.max_error, output.allowed_max_error, output.eager_max_error)
        table.add_row(*map(_cell, (case_id, output.output, str(why))), *map(_number, figures))
    return table


def _stage_table(finding: "Finding") -> "Table":
    """Where a failed artifact goes wrong: all stages that it shows, or the one sentence that there is."""
    table = _table(("stage", "", "where"), ("error", "eager", "times"))
    for stage in finding.stages:
        figures = (stage.rmse, stage.eager_rmse, stage.amplification)
        table.add_row(
            stage.stage, _mark(not stage.deviates, wrong="WRONG"), _cell(stage.node or "-"), *map(_number, figures)
        )
    if not finding.stages:
        table.add_row(finding.stage or "not found", "", _cell(finding.detail), "-", "-", "-")
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
