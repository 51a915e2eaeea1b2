"""``verify --html``: a verification on one self-contained page, for reviewers of a bundle."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.cli.report_charts import by_case, by_length_and_kind, ranges, text, times
from diffdeploy.cli.report_tables import allowance

if TYPE_CHECKING:
    from diffdeploy.verify import CaseReport, Report
    from diffdeploy.verify.coverage import Coverage

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --paper: #ffffff; --line: #d8dde3; --good: #0b5cad;
  --bad: #b42318; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #9aa4b0; --paper: #14171b; --line: #333a43;
  --good: #6db3f2; --bad: #ff8a7a; --soft: #1d2127; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.dim, figcaption { color: var(--dim); }
.verdict { display: inline-block; padding: .1rem .6rem; border-radius: .3rem; color: var(--paper); font-weight: 600; }
.verdict.passed { background: var(--good); } .verdict.failed { background: var(--bad); }
.scroll, .figure { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.failed td { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--dim); } svg .grid { stroke: var(--line); } svg .budget { stroke: var(--bad); stroke-width: 1.5;
  stroke-dasharray: 5 4; } svg .budget-label { fill: var(--bad); } svg circle.passed { fill: var(--good); }
svg path.failed { stroke: var(--bad); stroke-width: 2; fill: none; } svg .passed-square { fill: var(--good); }
svg .failed-square { fill: var(--bad); } svg .passed-cell { fill: var(--ink); } svg .failed-cell { fill: var(--paper); }
svg .declared { fill: var(--line); } svg .in-part { fill: var(--good); fill-opacity: .35; }
svg .whole { fill: var(--good); } svg .untried { fill: var(--paper); stroke: var(--line); }
""".strip()


def page(report: "Report", subject: Path) -> bytes:
    """Format the page.

    Args:
        report: report of a verification.
        subject: the bundle, or the report that was judged again.

    Returns:
        HTML in UTF-8, always the same bytes for the same report, with neither scripts nor links.
    """
    verdict = "passed" if report.passed else "failed"
    title = f"{subject.name} {verdict}"
    body = [
        f'<h1>{text(str(subject))} <span class="verdict {verdict}">{verdict}</span></h1>',
        _summary(report),
        *_errors(report.cases),
        *_stages(report),
        *_coverage(report.coverage),
        _section("Checks of structure and properties"),
        _table(
            ("check", "", "what was found"),
            [
                ((check.name, "ok" if check.passed else "FAILED", check.detail), check.passed)
                for check in report.contract
            ],
        ),
        *_loss(report),
        _section("Environment"),
        _facts(
            {
                "diffdeploy": report.environment.diffdeploy,
                "python": f"{report.environment.python} on {report.environment.machine}",
                **report.environment.packages,
            }
        ),
        _section("Files that were judged"),
        _table(("file", "sha256"), [((name, digest), True) for name, digest in report.files.items()]),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # The page must not load anything, no matter what the names from files contain.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{text(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    ).encode()


def _summary(report: "Report") -> str:
    failed = [case for case in report.cases if not case.passed]
    worst = report.worst
    facts = {
        "cases": f"{len(report.cases)}, of which {len(failed) or 'none'} failed",
        "checks": f"{len(report.contract)}, of which {sum(not c.passed for c in report.contract) or 'none'} failed",
    }
    if worst is not None and worst.budget_used is not None:
        facts["worst case"] = f"{worst.id} used {times(worst.budget_used)} its error budget"
    if (failure := report.first_failure()) is not None:
        facts["first failure"] = failure
    facts |= {
        "not tried": report.untried or "nothing; the declared ranges were tried completely",
        "graph": f"{report.graph.variant}, format {report.format}, {report.dtype}",
        "run by": report.backend,
        "inputs": f"{report.selection}, seed {report.seed}",
    }
    return _facts(facts)


def _errors(cases: "Sequence[CaseReport]") -> list[str]:
    if not cases:
        return []
    return [
        _section("Errors against the budget"),
        "<p>Each point is one case. It shows the error against the formula in fp64, as a share of the allowed error. "
        "The allowed error is the error of a correct computation in this dtype, times a factor, plus a floor"
        f"{allowance(cases)}. Crosses are failed cases.</p>",
        by_case(cases),
        _section("By length and kind"),
        "<p>The largest share of the budget that a case of this kind and sequence length used.</p>",
        by_length_and_kind(cases),
    ]


def _stages(report: "Report") -> list[str]:
    said = [_section("Stages")]
    guilty = report.guilty
    if guilty is None:
        return [*said, "<p>Nothing failed, so the stages of the formula were not examined separately.</p>"]
    first = guilty.stage or "none"
    said.append(f"<p>First stage that deviates: {text(f'{first}; {guilty.detail}')}; found by {guilty.found_by}.</p>")
    if not guilty.stages:
        return said
    rows = [
        (
            (
                stage.stage,
                "WRONG" if stage.deviates else "ok",
                *map(_number, (stage.rmse, stage.eager_rmse, stage.amplification)),
                stage.node or "-",
            ),
            not stage.deviates,
        )
        for stage in guilty.stages
    ]
    return [*said, _table(("stage", "", "error", "eager's error", "ratio", "node"), rows, numbers=(2, 3, 4))]


def _coverage(coverage: "Sequence[Coverage]") -> list[str]:
    if not coverage:
        return []
    rows = []
    for part in coverage:
        spans = (part.declared, part.compared_whole, part.compared_in_part)
        said = ["-" if span is None else f"{span.min} to {span.max}" for span in spans]
        untried = "-" if part.untried_text is None else part.untried_text.removeprefix(f"{part.axis} ")
        rows.append(((part.axis, *said, untried, str(part.num_sizes)), True))
    headings = ("range", "declared", "compared in full", "compared in part", "not tried", "sizes run")
    return [
        _section("Verified ranges"),
        "<p>Dark ranges were compared completely, light ones in some positions or rows. White ones were not tried.</p>",
        ranges(coverage),
        _table(headings, rows, numbers=(5,)),
    ]


def _loss(report: "Report") -> list[str]:
    if report.loss is None:
        return []
    note = "<p>Loss of the quantised weights, compared with the original ones; it is not part of the verdict.</p>"
    return [_section("Loss from quantised weights"), note, f"<p>{text(report.loss.summary)}</p>"]


def _section(heading: str) -> str:
    return f"<h2>{heading}</h2>"


def _facts(facts: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in facts.items())}</dl>"


def _table(headings: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]], *, numbers: Sequence[int] = ()) -> str:
    """HTML table that marks failed rows."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if column in numbers else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    lines = "".join(
        f"<tr{'' if right else ' class=' + chr(34) + 'failed' + chr(34)}>{row('td', cells)}</tr>"
        for cells, right in rows
    )
    head = f"<thead><tr>{row('th', headings)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
