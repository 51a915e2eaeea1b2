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

# Smaller changes are noise between versions and machines; --json lists all.
_SHOWN = 0.01
# Only the largest changes of cases are listed; all of them would hide the other changes.
_MOST_FIGURES = 8
# Enough to read most values; shapes of caches are the longest of them.
_WIDTH = 60
# Suffix for a property of a tensor or a range; the properties are merged, since users look for the tensor.
_PART = re.compile(r"\.(dtype|shape|min|max|values\.min|values\.max)$")


def diff(
    one: Annotated[Path, typer.Argument(help="A bundle, or a report that verify --save-report wrote.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="The bundle or report to compare it with.", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False,
) -> int:
    """Show what changed in figures, checks, versions, options, graph and files.

    Exits with 0 whether or not something changed: a difference is not an error in itself.
    """
    from diffdeploy.verify.differences import differences, read_described

    changes = differences(read_described(one), read_described(other))
    if as_json:
        fields = {"a": str(one), "b": str(other), "same": not changes, "changes": [asdict(c) for c in changes]}
        console.print_json(fields)
    elif changes:
        console.print_rows(_rows(changes))
    else:
        console.print_text(f"{one} and {other} do not differ")
    return 0


def _rows(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    """Rows of the changes by section; only the first row of a section has its name."""
    rows = [*_files([c for c in changes if c.section == "files"])]
    for section in dict.fromkeys(c.section for c in changes if c.section not in ("files", "figures")):
        rows += [(section, said) for said in _sentences([c for c in changes if c.section == section])]
    rows += _figures([change for change in changes if change.section == "figures"])
    return [
        ("" if number and rows[number - 1][0] == section else section, said)
        for number, (section, said) in enumerate(rows)
    ]


def _files(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    """Rows of the changed files, without digests, which would add nothing."""
    both = [c.name for c in changes if c.before is not None and c.after is not None]
    lacking = [c.name for c in changes if c.after is None], [c.name for c in changes if c.before is None]
    said = (("changed", both), ("only in A", lacking[0]), ("only in B", lacking[1]))
    return [("files", f"{what}: {', '.join(names)}") for what, names in said if names]


def _sentences(changes: "Sequence[Difference]") -> list[str]:
    """One sentence per change; names with the same change are merged, as are properties of entries in A or B alone."""
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
            # In inputs.position_ids.values.min, for example, the owner is inputs.position_ids.
            owner = _PART.sub("", name)
            between = " to " if name.endswith(".max") else ", "
            parts[owner] = parts[owner] + between + _short(value) if owner in parts else _short(value)
        said += [f"{name} is only in {side}: {value}" for name, value in by_layer(parts.items())]
    return said


def _figures(changes: "Sequence[Difference]") -> list[tuple[str, str]]:
    """Rows of the cases that changed most, and the number of others that changed."""
    both = [change for change in changes if change.before is not None and change.after is not None]
    moved = sorted((change for change in both if _moved(change) >= _SHOWN), key=_moved, reverse=True)
    rows = [f"{c.name}: {_share(c.before)} -> {_share(c.after)}" for c in moved[:_MOST_FIGURES]]
    for words, count in (
        ("more changed, each by less than those above", len(moved[_MOST_FIGURES:])),
        (f"changed by less than {_SHOWN:.0%} of the budget", len(both) - len(moved)),
        # Cases of another sweep are only counted, since listing them would hide the changes.
        ("only in A", sum(change.after is None for change in changes)),
        ("only in B", sum(change.before is None for change in changes)),
    ):
        rows += [f"{count} {words}"] if count else []
    return [("budget used", said) for said in rows]


def _moved(change: "Difference") -> float:
    before, after = change.before["budget_used"], change.after["budget_used"]
    # If an output had NaN or the wrong shape, there is no share to compare.
    return float("inf") if before is None or after is None else abs(before - after)


def _share(figures: dict[str, Any]) -> str:
    return str(figures["reason"]) if figures["budget_used"] is None else console.share(figures["budget_used"])


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(str, value))}]"
    return text if len(text) <= _WIDTH else text[:_WIDTH] + "..."
