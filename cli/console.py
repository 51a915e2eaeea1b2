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


# 128 plus the number of SIGINT, as in shells.
INTERRUPTED = 130


class Ended(Exception):  # noqa: N818 - the end of a command is not an error in itself
    """Ends a command with an exit code.

    Args:
        code: exit code.
        message: sentence to print; ``None`` if the command has printed everything.
    """

    def __init__(self, code: int, message: str | None = None) -> None:
        super().__init__(code)
        self.code, self.message = code, message


_quiet = False


@contextmanager
def quietly(wanted: bool) -> Iterator[None]:
    """If ``wanted``, print only results, warnings and errors in the ``with`` block."""
    global _quiet
    before, _quiet = _quiet, wanted
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """True if only results, warnings and errors are printed."""
    return _quiet


def standard_error() -> "Console":
    """Create rich's console for standard error, as wide as the terminal."""
    from rich.console import Console

    # Rich would colour every number in a sentence.
    return Console(stderr=True, highlight=False)


def print_json(fields: Any) -> None:
    """Print one JSON object to standard output."""
    # Not through rich, which would break lines and read brackets as markup. NaN is not valid JSON, so it is rejected.
    sys.stdout.write(json.dumps(fields, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Print a line of the result to standard output."""
    # Text from files may contain control sequences.
    sys.stdout.write(on_one_line(text) + "\n")
    sys.stdout.flush()


def print_part(text: str) -> None:
    """Print part of a text to standard output, with its line breaks and tabs."""
    # A model's text may contain control characters, too, but `isprintable` would also reject some spaces and joiners.
    obeyed = (letter not in "\n\t" and unicodedata.category(letter) == "Cc" for letter in text)
    sys.stdout.write("".join(repr(letter)[1:-1] if bad else letter for letter, bad in zip(text, obeyed, strict=True)))
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line to standard error, unless ``--quiet`` is given."""
    if not _quiet:
        _say(text)


def fail(message: str) -> None:
    """Print the sentence that says what went wrong."""
    # Messages of other libraries have several lines; a log is searched line by line.
    _say("error: " + " ".join(message.split()))


def warn(message: str) -> None:
    """Print a warning about something that is not an error."""
    _say("warning: " + " ".join(message.split()))


def _say(text: str) -> None:
    sys.stderr.write(on_one_line(text) + "\n")
    # Flushed, since a log may be read while the command runs, and another library may have wrapped standard error.
    sys.stderr.flush()


# rich has no unlimited width; no table here is this wide.
_UNLIMITED = 10_000
# Minimum width of a column of values, below which it would be mostly borders.
_NARROWEST = 20
_MANY_TIMES = 100
# Minimum number of columns in a table of figures: the name, and the most important figures.
_LEAST_FIGURES = 4


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns to standard output; on a terminal, values wrap between words."""
    width = max(len(name) for name, _ in rows) + 2
    stdout = _standard_output()
    room = max(stdout.width - width, _NARROWEST) if stdout.is_terminal else _UNLIMITED
    for name, value in rows:
        # Paths and digests are not broken, so that they can be copied.
        lines = textwrap.wrap(on_one_line(value), room, break_long_words=False, break_on_hyphens=False) or [""]
        print_text(f"{name:<{width}}{lines[0]}")
        for line in lines[1:]:
            print_text(" " * width + line)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output, at full width in a pipe."""
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(cell, row))
    print_whole(table, _standard_output())


def print_figures(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a title to standard output: names in the first column, figures in the others.

    On a terminal that is too narrow, the last columns are omitted, since a truncated number would be misleading.
    """
    print_text(title)
    stdout, shown, said = _standard_output(), len(headings), headings
    if stdout.is_terminal:
        # One word per line of a heading, since figures are narrow.
        said = [re.sub(r" (?!%)", "\n", heading) for heading in headings]
    table = _figures(said, rows, shown)
    while stdout.is_terminal and shown > _LEAST_FIGURES and _width(table) > stdout.width:
        shown -= 1
        table = _figures(said, rows, shown)
    print_whole(table, stdout)
    if shown < len(headings):
        print_text(f"shown in a wider terminal: {', '.join(headings[shown:])}")


def _figures(headings: Sequence[str], rows: Sequence[Sequence[str]], shown: int) -> "Table":
    """Create a table of the first ``shown`` columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Wrapped, not truncated, since a name is only useful if it is complete.
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:shown]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(cell, row[:shown]))
    return table


def _width(table: "Table") -> int:
    """Width that a table takes if nothing limits it."""
    from rich.console import Console

    return Console(width=_UNLIMITED).measure(table).maximum


def cell(text: str) -> str:
    """Escape text for rich, which reads brackets as markup, and for terminals."""
    from rich.markup import escape

    return escape(on_one_line(text))


def _standard_output() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def print_whole(table: "Table", console: "Console") -> None:
    """Print a table, at full width in a log or a pipe."""
    # rich assumes 80 columns without a terminal.
    if not console.is_terminal:
        console.width = _width(table)
    console.print(table)


def share(budget_used: float | None) -> str:
    """Format a share of an error budget, as a multiple if that is easier to read."""
    if budget_used is None:
        return "-"
    return f"{budget_used:.0%}" if budget_used < _MANY_TIMES else f"{budget_used:.2g} x"


def print_verdict(report: "Report", bundle: Path) -> None:
    """Print the verdict as one line to standard output."""
    worst = report.worst
    # Golden vectors alone do not verify a bundle: no contract was read, and no range was swept.
    fine, wrong = (
        ("golden vectors match", "golden vectors differ") if report.selection == "golden" else ("passed", "failed")
    )
    verdict = fine if report.passed else wrong
    used = ""
    if worst is not None and worst.budget_used is not None:
        used = f"worst {worst.id} used {share(worst.budget_used)} of its error budget; "
    untried = "" if report.untried is None else f"; not tried: {report.untried}"
    print_text(f"{verdict}: {bundle} ({len(report.cases)} cases; {used}{report.backend}{untried})")
