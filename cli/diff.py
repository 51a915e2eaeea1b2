"""``diffdeploy diff``: what changed between two bundles or two reports."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffdeploy.cli import console
from diffdeploy.cli.layer_rows import by_layer

if TYPE_CHECKING:
    from diffdeploy.verify.differences import Difference

__all__ = ["diff"]

# Smaller changes are noise of other versions and machines; --json has them all.
_SHOWN = 0.01
# Enough to tell digests apart and to read most values; shapes of caches are the longest of them.
_WIDTH = 48


def diff(
    one: Annotated[Path, typer.Argument(help="A bundle, or a report of verify --save-report.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="What it is compared with.", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False,
) -> int:
    """Say what changed in figures, checks, versions, options, graph and files.

    Exits with 0 whether something changed or not: no difference is an error by itself.
    """
    from diffdeploy.verify.differences import differences, read_described

    changes = differences(read_described(one), read_described(other))
    if as_json:
        fields = {"a": str(one), "b": str(other), "same": not changes, "changes": [asdict(c) for c in changes]}
        console.print_json(fields)
    elif changes:
        console.print_rows(_rows(changes))
    else:
        console.print_text(f"{one} and {other} say the same")
    return 0


def _rows(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    rows = by_layer(
        (f"{c.section} {c.name}", f"{_short(c.before)} -> {_short(c.after)}") for c in changes if not _is_figure(c)
    )
    figures = [change for change in changes if _is_figure(change)]
    both = [change for change in figures if change.before is not None and change.after is not None]
    moved = [change for change in both if _moved(change)]
    rows += [(f"budget used, {c.name}", f"{_share(c.before)} -> {_share(c.after)}") for c in moved]
    for words, count in (
        (f"changed by less than {_SHOWN:.0%} of the budget", len(both) - len(moved)),
        # Cases of other sweeps; each by itself would hide what changed.
        ("only in A", sum(change.after is None for change in figures)),
        ("only in B", sum(change.before is None for change in figures)),
    ):
        rows += [("figures", f"{count} {words}")] if count else []
    return rows


def _is_figure(change: "Difference") -> bool:
    return change.section == "figures"


def _moved(change: "Difference") -> bool:
    before, after = change.before["budget_used"], change.after["budget_used"]
    # Where an output had NaN, or the wrong shape, there is no share to compare.
    return before is None or after is None or abs(before - after) >= _SHOWN


def _share(figures: dict[str, Any]) -> str:
    return str(figures["reason"]) if figures["budget_used"] is None else f"{figures['budget_used']:.0%}"


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(str, value))}]"
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
