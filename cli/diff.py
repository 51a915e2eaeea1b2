"""``diffdeploy diff``: what changed between two bundles or two reports."""

import re
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
# The largest ones; a figure of each case would hide what else changed.
_MOST_FIGURES = 8
# Enough to read most values; shapes of caches are the longest of them.
_WIDTH = 60
# Of a tensor or a range; the tensor is what a reader looks for.
_PART = re.compile(r"\.(dtype|shape|min|max|values\.min|values\.max)$")


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
    """What changed, by section, whose name stands before its first row alone."""
    rows = [*_files([c for c in changes if c.section == "files"])]
    for section in dict.fromkeys(c.section for c in changes if c.section not in ("files", "figures")):
        rows += [(section, said) for said in _sentences([c for c in changes if c.section == section])]
    rows += _figures([change for change in changes if change.section == "figures"])
    return [
        ("" if number and rows[number - 1][0] == section else section, said)
        for number, (section, said) in enumerate(rows)
    ]


def _files(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    """Files by name; digests would only say again that they differ."""
    both = [c.name for c in changes if c.before is not None and c.after is not None]
    lacking = [c.name for c in changes if c.after is None], [c.name for c in changes if c.before is None]
    said = (("changed", both), ("only in A", lacking[0]), ("only in B", lacking[1]))
    return [("files", f"{what}: {', '.join(names)}") for what, names in said if names]


def _sentences(changes: "Sequence[Difference]") -> list[str]:
    """One for each change of a value; names that changed alike share one, and so do the parts of what is new."""
    merged: dict[str, list[str]] = {}
    for c in changes:
        if c.before is not None and c.after is not None:
            merged.setdefault(f"{_short(c.before)} -> {_short(c.after)}", []).append(c.name)
    said = []
    for what, names in merged.items():
        alike = ", ".join(name for name, _ in by_layer((name, "") for name in names))
        said.append(f"{alike}: {what}")
    for side, only in (
        ("A", {c.name: c.before for c in changes if c.after is None}),
        ("B", {c.name: c.after for c in changes if c.before is None}),
    ):
        parts: dict[str, str] = {}
        for name, value in only.items():
            # Such as of inputs.position_ids, of which values.min is a part.
            owner = _PART.sub("", name)
            between = " to " if name.endswith(".max") else ", "
            parts[owner] = parts[owner] + between + _short(value) if owner in parts else _short(value)
        said += [f"{name} is only in {side}: {value}" for name, value in by_layer(parts.items())]
    return said


def _figures(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    """The cases that moved most, and how many others did."""
    both = [change for change in changes if change.before is not None and change.after is not None]
    moved = sorted((change for change in both if _moved(change) >= _SHOWN), key=_moved, reverse=True)
    rows = [f"{c.name}: {_share(c.before)} -> {_share(c.after)}" for c in moved[:_MOST_FIGURES]]
    for words, count in (
        ("more moved, each by less", len(moved[_MOST_FIGURES:])),
        (f"changed by less than {_SHOWN:.0%} of the budget", len(both) - len(moved)),
        # Cases of other sweeps; each by itself would hide what changed.
        ("only in A", sum(change.after is None for change in changes)),
        ("only in B", sum(change.before is None for change in changes)),
    ):
        rows += [f"{count} {words}"] if count else []
    return [("budget used", said) for said in rows]


def _moved(change: "Difference") -> float:
    before, after = change.before["budget_used"], change.after["budget_used"]
    # Where an output had NaN, or the wrong shape, there is no share to compare.
    return float("inf") if before is None or after is None else abs(before - after)


def _share(figures: dict[str, Any]) -> str:
    return str(figures["reason"]) if figures["budget_used"] is None else console.share(figures["budget_used"])


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(str, value))}]"
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
