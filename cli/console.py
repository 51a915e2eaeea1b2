"""All printing: results to standard output, everything else to standard error."""

import json
import sys
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
        table.add_row(*map(cell, row))
    print_whole(table, _standard_output())


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
        table.add_row(*map(cell, row))
    print_whole(table, _standard_output())


def cell(text: str) -> str:
    """A text as it is: for rich, which takes brackets for markup, and for a terminal."""
    from rich.markup import escape

    return escape(on_one_line(text))


def _standard_output() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def print_whole(table: "Table", console: "Console") -> None:
    """Print a table; in a log or a pipe, which have no edge to fit into, as wide as it needs to be."""
    # Rich takes 80 columns where it finds no terminal. It measures a table within the width that it has, hence twice.
    if not console.is_terminal:
        console.width = _UNLIMITED
        console.width = console.measure(table).maximum
    console.print(table)


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
