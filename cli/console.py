"""All printing: results to standard output, everything else to standard error."""

import json
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.errors import on_one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from diffdeploy.verify import Report

__all__ = [
    "INTERRUPTED",
    "Ended",
    "cell",
    "fail",
    "is_quiet",
    "note",
    "print_figures",
    "print_json",
    "print_part",
    "print_rows",
    "print_table",
    "print_text",
    "print_verdict",
    "print_whole",
    "quietly",
    "share",
    "standard_error",
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


_quiet = False


@contextmanager
def quietly(wanted: bool) -> Iterator[None]:
    """Within the block, if that is wanted, nothing is said but results, warnings and errors."""
    global _quiet
    before, _quiet = _quiet, wanted
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether nothing is said but results, warnings and errors."""
    return _quiet


def standard_error() -> "Console":
    """Standard error for rich, as wide as a terminal is."""
    from rich.console import Console

    # Rich would colour every number in a sentence.
    return Console(stderr=True, highlight=False)


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
    """A line on standard error, which ``--quiet`` leaves out."""
    if not _quiet:
        _say(text)


def fail(message: str) -> None:
    """The one sentence that says what went wrong."""
    # Messages of other libraries have several lines; a log is searched line by line.
    _say("error: " + " ".join(message.split()))


def warn(message: str) -> None:
    """What went wrong, where that is no error."""
    _say("warning: " + " ".join(message.split()))


def _say(text: str) -> None:
    sys.stderr.write(on_one_line(text) + "\n")
    # A log that is read while the work goes on may be a pipe that another library has wrapped.
    sys.stderr.flush()


# Rich has no width without end; no table of ours is as wide as this.
_UNLIMITED = 10_000
# A column of values; narrower ones would be all edge.
_NARROWEST = 20
_MANY_TIMES = 100
# Of columns of figures: a name, and what was asked for.
_LEAST_FIGURES = 4


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns on standard output; a terminal breaks values between words."""
    width = max(len(name) for name, _ in rows) + 2
    stdout = _standard_output()
    room = max(stdout.width - width, _NARROWEST) if stdout.is_terminal else _UNLIMITED
    for name, value in rows:
        # Paths and digests stay whole, to be copied.
        lines = textwrap.wrap(on_one_line(value), room, break_long_words=False, break_on_hyphens=False) or [""]
        print_text(f"{name:<{width}}{lines[0]}")
        for line in lines[1:]:
            print_text(" " * width + line)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; in a pipe it is as wide as it needs to be."""
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(cell, row))
    print_whole(table, _standard_output())


def print_figures(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output with a title: names in the first column, figures in the others.

    The last columns are left out of a terminal that is too narrow for them, since a figure that is cut is none.
    """
    print_text(title)
    stdout, shown, said = _standard_output(), len(headings), headings
    if stdout.is_terminal:
        # A word a line, as figures are narrow.
        said = [re.sub(r" (?!%)", "\n", heading) for heading in headings]
    table = _figures(said, rows, shown)
    while stdout.is_terminal and shown > _LEAST_FIGURES and _width(table) > stdout.width:
        shown -= 1
        table = _figures(said, rows, shown)
    print_whole(table, stdout)
    if shown < len(headings):
        print_text(f"in a wider terminal also: {', '.join(headings[shown:])}")


def _figures(headings: Sequence[str], rows: Sequence[Sequence[str]], shown: int) -> "Table":
    """The first columns of a table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Folded, not cut: a name must be whole to be used.
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:shown]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(cell, row[:shown]))
    return table


def _width(table: "Table") -> int:
    """Of a table that has all the room it wants."""
    from rich.console import Console

    return Console(width=_UNLIMITED).measure(table).maximum


def cell(text: str) -> str:
    """A text as it is: for rich, which takes brackets for markup, and for a terminal."""
    from rich.markup import escape

    return escape(on_one_line(text))


def _standard_output() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def print_whole(table: "Table", console: "Console") -> None:
    """Print a table; in a log or a pipe, which have no edge to fit into, as wide as it needs to be."""
    # Rich takes 80 columns where it finds no terminal.
    if not console.is_terminal:
        console.width = _width(table)
    console.print(table)


def share(budget_used: float | None) -> str:
    """A share of an error budget in a few letters; a multiple where that is easier to read."""
    if budget_used is None:
        return "-"
    return f"{budget_used:.0%}" if budget_used < _MANY_TIMES else f"{budget_used:.2g} x"


def print_verdict(report: "Report", bundle: Path) -> None:
    """The verdict in one line on standard output."""
    worst = report.worst
    # Outputs that travel with a bundle are no proof of it: no contract was read, and no range was swept.
    fine, wrong = (
        ("golden vectors match", "golden vectors differ") if report.selection == "golden" else ("passed", "failed")
    )
    verdict = fine if report.passed else wrong
    used = ""
    if worst is not None and worst.budget_used is not None:
        used = f"worst {worst.id} used {share(worst.budget_used)} of its error budget; "
    untried = "" if report.untried is None else f"; not tried: {report.untried}"
    print_text(f"{verdict}: {bundle} ({len(report.cases)} cases; {used}{report.backend}{untried})")
