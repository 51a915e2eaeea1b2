"""Write the page of results from files of ``diffdeploy bench --save``; figures are drawn next to the JSON files.

python scripts/benchmarks_page.py docs/benchmarks.md docs/benchmarks/*.json
"""

import argparse
import os
from pathlib import Path

from diffdeploy.bench.plot import plot
from diffdeploy.bench.results import BenchReport, read_report
from diffdeploy.bench.table import HEADINGS, describe_size, figures, legend, machine
from diffdeploy.errors import InputError

_TITLES = {"plain": "Prefill", "masked": "Prefill of a padded batch", "cached": "One token with a cache"}


def page(target: Path, files: list[Path]) -> str:
    """Create the whole page.

    Args:
        target: path of the page, for the links to the figures.
        files: JSON files of the runs; the figure of each is next to it, with the suffix ``.svg``.
    """
    reports = {file: read_report(file) for file in files}
    # Relative paths, so that the page is the same on every machine.
    named = " ".join(os.path.relpath(file) for file in files)
    lines = [
        "# Benchmarks",
        "",
        f"`python scripts/benchmarks_page.py {os.path.relpath(target)} {named}` wrote this page from files of "
        "`diffdeploy bench --save`.",
        "",
        "A whole block is measured: hidden states in, output out. `softmax` is a plain attention block with the same "
        "parameter count, computed by one call of `scaled_dot_product_attention`; the other names are eager "
        "implementations of the differential block and exported bundles of it. Each was verified at the size at "
        "which it was timed, and on the same input.",
        "",
        *(f"- {name}: {text}" for name, text in _joined(legend(next(iter(reports.values())).baseline))),
    ]
    for kind in ("CPU", "CUDA"):
        own = {
            file: report for file, report in reports.items() if (report.environment.device == "cpu") == (kind == "CPU")
        }
        if own:
            lines += ["", f"## {kind}"]
        for file, report in own.items():
            lines += ["", *_section(report, os.path.relpath(file.with_suffix(".svg"), target.parent))]
    return "\n".join(lines) + "\n"


def _section(report: BenchReport, figure: str) -> list[str]:
    title = f"{_TITLES[report.graph]}, {report.dtype}"
    lines = [f"### {title}", "", f"`{report.command}`, {report.environment.measured_at}", ""]
    lines += [f"- {name}: {value}" for name, value in machine(report)]
    lines += ["", f"![{title}: latency over length]({figure})"]
    for size in report.sizes:
        heading = describe_size(report, size)
        lines += ["", heading[0].upper() + heading[1:] + ".", ""]
        # Names are aligned left, figures right.
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
        lines += ["| " + " | ".join(figures(row)) + " |" for row in report.rows_of(size)]
    return lines


def _joined(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join lines with their continuations."""
    joined: list[tuple[str, str]] = []
    for name, text in rows:
        joined = [*joined, (name, text)] if name else [*joined[:-1], (joined[-1][0], f"{joined[-1][1]} {text}")]
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", type=Path, help="Markdown file to write.")
    parser.add_argument("files", type=Path, nargs="+", help="JSON that diffdeploy bench --save wrote.")
    options = parser.parse_args()
    try:
        # The page comes before the figures, so that an unreadable file leaves nothing half-written.
        text = page(options.target, options.files)
    except InputError as error:
        parser.error(str(error))
    for file in options.files:
        plot(read_report(file), file.with_suffix(".svg"))
    options.target.write_text(text)


if __name__ == "__main__":
    main()
