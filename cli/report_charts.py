"""The figures of the HTML report, as inline SVG that needs no script."""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from diffdeploy.errors import on_one_line

if TYPE_CHECKING:
    from diffdeploy.verify import CaseReport
    from diffdeploy.verify.coverage import Coverage

__all__ = ["by_case", "by_length_and_kind", "ranges", "text", "times"]

_WIDTH = 720
# Approximate width of a letter of a label, to leave room for labels.
_LETTER = 6.6
# Length in the name of a case, such as B2-P5-S1-left-normal or random10-B3-S14-heavy.
_LENGTH = re.compile(r"(?:^|-)S(\d+)")
# Share that is drawn for cases whose error could not be measured; larger shares are written as multiples.
_NO_NUMBER = 10.0
# Powers of ten from this exponent on are written with a superscript.
_LONG = 4
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(said: str) -> str:
    """Escape text, which may contain names from files, for HTML and SVG."""
    return escape(on_one_line(said))


def by_case(cases: "Sequence[CaseReport]") -> str:
    """Plot every case's share of the error budget on a logarithmic scale, with the budget as a line."""
    shares = [_share(case) for case in cases]
    # At least a factor of ten around the budget, so that its line is inside the figure.
    low = math.floor(math.log10(max(min([*shares, 0.1]), 0.01)))
    high = max(1, math.ceil(math.log10(max([*shares, 1.0]))))
    height, left, top = 240, 56, 12
    scale = (height - top - 34) / (high - low)

    def y(share: float) -> float:
        return top + (high - math.log10(max(share, 10.0**low))) * scale

    step = (_WIDTH - left - 12) / max(len(cases), 1)
    parts = [_grid(left, y(10.0**power), _power(power)) for power in range(low, high + 1)]
    parts.append(f'<line class="budget" x1="{left}" x2="{_WIDTH}" y1="{y(1):.1f}" y2="{y(1):.1f}"/>')
    parts.append(f'<text class="budget-label" x="{_WIDTH - 4}" y="{y(1) - 5:.1f}" text-anchor="end">budget</text>')
    for number, (case, share) in enumerate(zip(cases, shares, strict=True)):
        parts.append(_mark(left + (number + 0.5) * step, y(share), case))
    said = "cases in the order of the run; error as a multiple of the allowed error"
    parts.append(f'<text x="{(left + _WIDTH) / 2:.0f}" y="{height - 6}" text-anchor="middle">{said}</text>')
    return _svg(height, "Error of each case as a share of its budget", parts)


def _power(power: int) -> str:
    """Format a power of ten, in plain digits if it has only a few."""
    return f"{10.0**power:g}" if abs(power) < _LONG else "10" + str(power).translate(_SUPERSCRIPTS)


def times(share: float) -> str:
    """Format a share of the budget, as a multiple if that is easier to read."""
    return f"{share:.1%} of" if share < _NO_NUMBER else f"{share:,.3g} times"


def _share(case: "CaseReport") -> float:
    return _NO_NUMBER if case.budget_used is None else case.budget_used


def _grid(left: float, y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{left}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _mark(x: float, y: float, case: "CaseReport") -> str:
    """Draw a case as a point with a tooltip, or as a cross if it failed, so that it is visible without colours."""
    said = f"{case.id}: {case.failure}" if not case.passed else f"{case.id}: {times(_share(case))} the budget"
    if case.passed:
        return f'<circle class="passed" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{text(said)}</title></circle>'
    path = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
    return f'<path class="failed" d="{path}"><title>{text(said)}</title></path>'


def by_length_and_kind(cases: "Sequence[CaseReport]") -> str:
    """Plot the largest share of the budget that any case used, by kind and number of new positions."""
    worst: dict[tuple[str, int | None], CaseReport] = {}
    for case in cases:
        key = case.group, _length(case)
        if key not in worst or case.severity > worst[key].severity:
            worst[key] = case
    kinds = list(dict.fromkeys(kind for kind, _ in worst))
    # Cases without a length in their names, such as those of single layers, are in the last column.
    lengths: list[int | None] = [*sorted({length for _, length in worst if length is not None})]
    lengths += [None] if any(length is None for _, length in worst) else []
    left, top, row = 8 + _LETTER * max((len(kind) for kind in kinds), default=0), 34, 20
    column = (_WIDTH - left) / max(len(lengths), 1)
    parts = [f'<text x="{left}" y="12">length</text>']
    for number, length in enumerate(lengths):
        said = "-" if length is None else str(length)
        parts.append(f'<text x="{left + (number + 0.5) * column:.1f}" y="28" text-anchor="middle">{said}</text>')
    for line, kind in enumerate(kinds):
        y = top + line * row
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 14}" text-anchor="end">{text(kind)}</text>')
        for number, length in enumerate(lengths):
            if (found := worst.get((kind, length))) is not None:
                parts.append(_square(left + number * column, y, column, row, found))
    return _svg(top + row * len(kinds) + 4, "Largest share of the budget by length and kind", parts)


def _length(case: "CaseReport") -> int | None:
    found = _LENGTH.search(case.id)
    return None if found is None else int(found[1])


def _square(x: float, y: float, width: float, height: float, case: "CaseReport") -> str:
    share = _share(case)
    said = "-" if case.budget_used is None else f"{share:.0%}" if share < _NO_NUMBER else "&gt; 999%"
    title = f"{case.id}: {case.failure}" if not case.passed else f"{case.id}: {times(share)} the budget"
    kind = "passed" if case.passed else "failed"
    # At least 0.1, so that the smallest share is visible; a square root, so that small shares can be told apart.
    opacity = 1.0 if not case.passed else 0.1 + 0.6 * math.sqrt(min(share, 1.0))
    label = f'<text class="{kind}-cell" x="{x + width / 2:.1f}" y="{y + 14}" text-anchor="middle">{said}</text>'
    return (
        f'<g><rect class="{kind}-square" x="{x + 1:.1f}" y="{y + 1}" width="{width - 2:.1f}" height="{height - 2}" '
        f'fill-opacity="{opacity:.2f}"/>{label if width > len(said) * _LETTER else ""}<title>{text(title)}</title></g>'
    )


def ranges(coverage: "Sequence[Coverage]") -> str:
    """Plot the declared and the compared range of each axis on a logarithmic scale."""
    left, row = 8 + _LETTER * max((len(part.axis) for part in coverage), default=0), 34
    largest = max((part.declared.max for part in coverage), default=1)
    parts: list[str] = []

    def x(size: int) -> float:
        # Plus one, since the number of cached tokens may be 0, which has no logarithm.
        return left + (_WIDTH - left - 44) * math.log(size + 1) / math.log(largest + 1)

    for number, part in enumerate(coverage):
        y = 6 + number * row
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 12}" text-anchor="end">{text(part.axis)}</text>')
        for kind, found in (
            ("declared", part.declared),
            ("in-part", part.compared_in_part),
            ("whole", part.compared_whole),
            *(("untried", gap) for gap in part.untried),
        ):
            if found is not None:
                said = f"{kind.replace('-', ' ')}: {found.min} to {found.max}"
                width = max(x(found.max) - x(found.min), 3)
                parts.append(
                    f'<rect class="{kind}" x="{x(found.min):.1f}" y="{y}" width="{width:.1f}" height="16">'
                    f"<title>{said}</title></rect>"
                )
        last = x(part.declared.max)
        parts.append(f'<text x="{last + 4:.1f}" y="{y + 12}">{part.declared.max}</text>')
    return _svg(row * len(coverage) + 4, "Ranges that were declared and compared", parts)


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<div class="figure"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></div>"
    )
