"""Create the page docs/runtime-versions.md from the measurements of `measure_runtime_versions.py`."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import inf, isfinite
from typing import NamedTuple

from diffdeploy.versions import release

__all__ = ["Row", "Verdict", "page", "table"]

INTRODUCTION = """# Runtime versions that run bundles correctly

This command wrote the page:

    python scripts/measure_runtime_versions.py {arguments}

Bundles of small blocks (D 64, h 4, d 16; h_kv 4 if they are not grouped, else 2), exported with torch {torch}, are
run by each version on {cases} cases of the verification (lengths up to 129, batches up to 8, and masks, caches and
values of every kind) and compared with fp64, within the budgets of the verification. All measurements were made on a
CPU ({machine}) with Python {python} and numpy {numpy}; CUDA was not measured.

- ok: every output is within its budget
- off by 1.8: the error of the worst output is 1.8 times the allowed error; "no number" is NaN, or no output at all
- refuses: the version does not load the artifact
- no import: the version cannot be imported here, in most cases because it needs another version of numpy

The version under "correct from" and all later ones are ok. "least" is the version that `Format.least_versions` returns,
that manifests record and that `load` requires; it is never older than "correct from", and is newer where
`Format.least_versions` distinguishes fewer cases than this table.
"""
NOTES = {
    "onnxruntime": """\
- 1.16 and older refuse the IR version that torch writes, and every version refuses opsets that are newer than it is.
- In `Attention` of 1.23.0, grouped query heads read the wrong key/value heads.
- In `GroupQueryAttention` up to 1.23.2, a query attends to one key more than the window allows. If a mask is
  given, it hides that key in float32; in float16, it does so unless the key's score is an outlier. Up to 1.21, the
  operator has no mask.
- Apart from that key, float16 is correct where float32 is, since bundles now compute attention in float32. Older
  bundles do not, and outliers make them wrong in every version that was tried: export those again.
- bfloat16 has no kernels for the CPU, and is refused by 1.19.2, 1.22.1, 1.24.1, 1.28.0, 1.31.1 and 1.32.0.
""",
    "torch": """\
Programs exported by torch 2.11.0 and 2.14.1 passed `diffdeploy verify` in 2.11.0, 2.13.0 and 2.14.1, too. `aoti` and
`compile` bundles are tied to the torch version that compiled them; `--recompile` accepts any version that
`pyproject.toml` allows.
""",
}


class Verdict(NamedTuple):
    """Result of running a bundle in a version.

    Attributes:
        kind: ``ok``, ``off``, ``refuses`` or ``no import``.
        used: share of the budget of the worst output, infinite if there is no number.
        reason: description of what is wrong.
    """

    kind: str
    used: float = inf
    reason: str = ""

    @property
    def cell(self) -> str:
        """Text in a table."""
        if self.kind != "off":
            return self.kind
        if not isfinite(self.used):
            return "off: no number"
        rounded = float(f"{self.used:.2g}")
        return f"off by {rounded:g}" if rounded < 10 else f"off by {rounded:,.0f}"


class Row(NamedTuple):
    """Results of all versions for a bundle, or for several that differ only in their dtype.

    Attributes:
        export: description of the export.
        graph: variant of the graph.
        block: distinguishing feature of the block.
        dtypes: dtypes of the bundles.
        verdicts: verdicts on the worst of them, by version, the oldest first.
        least: least version according to the format.
    """

    export: str
    graph: str
    block: str
    dtypes: list[str]
    verdicts: dict[str, Verdict]
    least: str

    @property
    def right_from(self) -> str:
        """The first version from which all are correct."""
        found = "none"
        for version, verdict in reversed(self.verdicts.items()):
            if verdict.kind != "ok":
                break
            found = version
        return found

    @property
    def admitted(self) -> list[str]:
        """Versions that are wrong, although the format admits them."""
        wrong = [version for version, verdict in self.verdicts.items() if verdict.kind != "ok"]
        return [version for version in wrong if release(version) >= release(self.least)]


def merged(rows: Sequence[Row]) -> list[Row]:
    """Merge neighbours that differ only in the dtype, unless a version treats them differently."""

    def what(row: Row) -> tuple[object, ...]:
        kinds = [verdict.kind for verdict in row.verdicts.values()]
        return row.export, row.graph, row.block, row.least, kinds

    together = []
    for _, alike in groupby(rows, key=what):
        group = list(alike)
        dtypes = [dtype for row in group for dtype in row.dtypes]
        worst = {version: _worst([row.verdicts[version] for row in group]) for version in group[0].verdicts}
        together.append(group[0]._replace(dtypes=dtypes, verdicts=worst))
    return together


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: verdict.used)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with one column for all neighbouring versions with the same results in every row."""
    rows = merged(rows)
    spans = [
        list(span)
        for _, span in groupby(rows[0].verdicts, key=lambda version: [row.verdicts[version].kind for row in rows])
    ]
    titles = [span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
    headings = ["export", "graph", "block", "dtype", *titles, "correct from", "least"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in rows:
        cells = [_worst([row.verdicts[version] for version in span]).cell for span in spans]
        named = [row.export, row.graph, row.block, ", ".join(row.dtypes)]
        lines.append("| " + " | ".join([*named, *cells, row.right_from, row.least]) + " |")
    return lines


def page(rows_of: Mapping[str, Sequence[Row]], measured: Mapping[str, object]) -> str:
    """Create the whole page.

    Args:
        rows_of: a row for each bundle, by package.
        measured: facts about the measurement, by the names in the introduction.
    """
    lines = [INTRODUCTION.format(**measured)]
    for package, rows in rows_of.items():
        lines += [f"## {package}", "", NOTES[package], *table(rows), ""]
    return "\n".join(lines)
