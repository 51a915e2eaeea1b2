"""``inspect --draw``: the part of a graph around the attention operators of one layer, as an SVG file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffdeploy.cli.report_charts import text

if TYPE_CHECKING:
    from diffdeploy.formats import GraphNode

__all__ = ["draw"]

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _EDGE = 168, 34, 18, 26, 16
# Number of letters that fit in a box.
_LETTERS = 27
# Number of passes, enough for the order of boxes to become stable.
_ROUNDS = 8

_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1b1f24; text-anchor: middle; } .small { font-size: 9px; fill: #5b6470; }
.title { font-size: 13px; text-anchor: start; } rect { fill: #f3f5f7; stroke: #8a94a0; }
.attention rect { fill: #0b5cad; stroke: #0b5cad; } .attention text { fill: #ffffff; }
.layout rect { fill: #ffffff; stroke-dasharray: 3 3; }
.value rect { fill: #ffffff; stroke: none; } path { fill: none; stroke: #8a94a0; stroke-width: 1.2; }
""".strip()


@dataclass
class _Box:
    """One node, or a chain of nodes that only rearrange data."""

    labels: list[str]
    kind: str
    small: list[str] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    row: int = 0
    column: float = 0.0


def draw(nodes: "Sequence[GraphNode]", attention: range, title: str) -> bytes:
    """Draw the figure.

    Args:
        nodes: nodes of the graph, in order.
        attention: indices of the layer's attention operators among those of the graph.
        title: title of the figure.

    Returns:
        SVG in UTF-8, always the same bytes for the same graph.
    """
    chosen = _around([node for node in nodes if node.kind != "sizes"], attention)
    boxes = _boxes(chosen, {name for node in nodes if node.kind == "sizes" for name in node.gives})
    rows = _rows(boxes)
    return _svg(boxes, rows, title).encode()


def _around(nodes: "Sequence[GraphNode]", attention: range) -> "list[GraphNode]":
    """Nodes from the projections of queries, keys and values to the output projection, in order."""
    makers = {name: number for number, node in enumerate(nodes) for name in node.gives}
    before = [[makers[name] for name in node.takes if name in makers] for node in nodes]
    after: list[list[int]] = [[] for _ in nodes]
    for number, others in enumerate(before):
        for other in others:
            after[other].append(number)
    found = [number for number, node in enumerate(nodes) if node.kind == "attention"]
    start = [found[number] for number in attention]
    chosen = _reach(start, before, nodes) | _reach(start, after, nodes)
    # Nodes without inputs prepare constants; they are drawn with the nodes that read the constants.
    chosen |= {other for number in chosen for other in before[number] if not nodes[other].takes}
    return [nodes[number] for number in sorted(chosen)]


def _reach(start: Iterable[int], edges: Sequence[Sequence[int]], nodes: "Sequence[GraphNode]") -> set[int]:
    """Nodes that can be reached without going beyond a projection, or into another attention operator."""
    found = set(start)
    waiting = list(found)
    while waiting:
        for other in edges[waiting.pop()]:
            if nodes[other].kind != "attention" and other not in found:
                found.add(other)
                waiting += [] if nodes[other].kind == "projection" else [other]
    return found


def _boxes(nodes: "Sequence[GraphNode]", sizes: set[str]) -> list[_Box]:
    """Create boxes with their edges, for inputs and nodes; a chain of nodes that only rearrange data shares one box."""
    boxes: list[_Box] = []
    makers: dict[str, int] = {}
    uses = _uses(nodes)
    for node in nodes:
        takes = [name for name in node.takes if name not in sizes]
        for name in takes:
            if name not in makers:
                makers[name] = len(boxes)
                boxes.append(_Box([name], "value"))
        owner = makers[takes[0]] if takes else None
        chained = owner is not None and boxes[owner].kind == node.kind == "layout" and uses.get(takes[0]) == 1
        if chained and owner is not None:
            boxes[owner].labels.append(node.operator)
            boxes[owner].small += node.constants
        else:
            boxes.append(_Box([node.operator], node.kind, list(node.constants), [makers[name] for name in takes]))
            owner = len(boxes) - 1
        assert owner is not None
        makers |= dict.fromkeys(node.gives, owner)
    for number, box in enumerate(boxes):
        for other in box.before:
            boxes[other].after.append(number)
    return boxes


def _uses(nodes: "Sequence[GraphNode]") -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for node in nodes:
        for name in node.takes:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _rows(boxes: list[_Box]) -> list[list[int]]:
    """Arrange boxes in rows, each box below all of its inputs, in an order with few crossing edges."""
    for box in boxes:
        box.row = max((boxes[other].row + 1 for other in box.before), default=0)
    for box in reversed(boxes):
        # Placed as close to its users as possible.
        if box.after and not box.before:
            box.row = min(boxes[other].row for other in box.after) - 1
    rows: list[list[int]] = [[] for _ in range(max((box.row for box in boxes), default=0) + 1)]
    for number, box in enumerate(boxes):
        box.column = float(len(rows[box.row]))
        rows[box.row].append(number)
    for turn in range(_ROUNDS):
        for row in rows if turn % 2 == 0 else reversed(rows):
            _order(boxes, row, downwards=turn % 2 == 0)
    return rows


def _order(boxes: list[_Box], row: list[int], *, downwards: bool) -> None:
    """Place each box of a row at the mean position of its neighbours, without overlaps."""

    def wanted(number: int) -> float:
        near = boxes[number].before if downwards else boxes[number].after
        return sum(boxes[other].column for other in near) / len(near) if near else boxes[number].column

    places = {number: wanted(number) for number in row}
    row.sort(key=lambda number: (places[number], number))
    columns = [places[number] for number in row]
    for place in range(1, len(columns)):
        columns[place] = max(columns[place], columns[place - 1] + 1)
    # Shift the row back, so that its mean position is unchanged.
    shift = sum(places[number] for number in row) / len(row) - sum(columns) / len(row)
    for number, column in zip(row, columns, strict=True):
        boxes[number].column = column + shift


def _svg(boxes: list[_Box], rows: list[list[int]], title: str) -> str:
    first = min((box.column for box in boxes), default=0.0)
    last = max((box.column for box in boxes), default=0.0)
    width = (last - first) * (_BOX_WIDTH + _GAP_X) + _BOX_WIDTH + 2 * _EDGE
    height = len(rows) * (_BOX_HEIGHT + _GAP_Y) + 3 * _EDGE

    def place(box: _Box) -> tuple[float, float]:
        return _EDGE + (box.column - first) * (_BOX_WIDTH + _GAP_X), 2.5 * _EDGE + box.row * (_BOX_HEIGHT + _GAP_Y)

    parts = [f'<text class="title" x="{_EDGE}" y="{1.5 * _EDGE}">{text(title)}</text>']
    for box in boxes:
        for other in box.before:
            parts.append(_edge(place(boxes[other]), place(box)))
    parts += [_box(box, *place(box)) for box in boxes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}"><style>{_STYLE}</style><rect class="paper" width="100%" height="100%" '
        f'style="fill: #ffffff; stroke: none"/>{"".join(parts)}</svg>\n'
    )


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y = start[0] + _BOX_WIDTH / 2, start[1] + _BOX_HEIGHT
    to_x, to_y = end[0] + _BOX_WIDTH / 2, end[1]
    bend = max((to_y - y) / 2, _GAP_Y / 2)
    return f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"/>'


def _box(box: _Box, x: float, y: float) -> str:
    # Names of traced modules begin with their root, which says nothing.
    small = ", ".join(name.removeprefix("block.") for name in box.small)
    middle, lines = x + _BOX_WIDTH / 2, [(_shortened(" · ".join(box.labels)), "")]
    lines += [(_shortened(small, 1.2), ' class="small"')] if small else []
    top = y + _BOX_HEIGHT / 2 + 4 - 6 * (len(lines) - 1)
    said = "".join(
        f'<text{kind} x="{middle:.0f}" y="{top + 12 * number:.0f}">{text(line)}</text>'
        for number, (line, kind) in enumerate(lines)
    )
    full = text(" · ".join(box.labels) + (f"; {small}" if small else ""))
    return (
        f'<g class="{box.kind}"><rect x="{x:.0f}" y="{y:.0f}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="4"/>'
        f"{said}<title>{full}</title></g>"
    )


def _shortened(said: str, room: float = 1.0) -> str:
    most = int(_LETTERS * room)
    return said if len(said) <= most else said[: most - 1] + "…"
