"""The figure of a run: latency against length on logarithmic axes, with the time of the matrix products alone."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.bench.plan import SOFTMAX_BLOCKS
from diffdeploy.bench.results import BenchReport, Row
from diffdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SUFFIXES", "plot", "require_plot"]

SUFFIXES = (".svg", ".png")
# Distinguishable without colour: each candidate has its own marker, and neighbours have different lines.
_MARKERS = "osD^vPX<>*hpd8"
_LINES = ("-", "--", "-.", (0, (1, 1)))
_SHADES = ("#000000", "#0b5394", "#a64d00", "#38761d", "#741b47", "#5b5b5b", "#b45f06", "#134f5c")


def require_plot(path: Path) -> None:
    """Check that a figure can be written, before anything is measured.

    Raises:
        InputError: the suffix is not accepted, or the folder does not exist.
        UnavailableError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if path.suffix not in SUFFIXES:
        raise InputError(f"the figure cannot be written to {path}; accepted: file names that end in .svg or .png")
    if find_spec("matplotlib") is None:
        raise UnavailableError("a plot needs matplotlib, which is not installed; pip install 'diffdeploy[plot]'")


def plot(report: BenchReport, path: Path) -> None:
    """Write the figure of a run: one panel per batch size.

    Args:
        report: report of the run.
        path: file to write, ``.svg`` or ``.png``.

    Raises:
        InputError: no candidate in the report has a latency.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    batch_sizes = list(dict.fromkeys(size.batch_size for size in report.sizes))
    if all(row.latency_ms is None for row in report.results):
        raise InputError(f"{path} was not written: no candidate has a latency")
    # A fixed salt here and no date below, so that figures of unchanged results do not change in version control.
    with mpl.rc_context({"svg.hashsalt": "diffdeploy", "font.size": 9}):
        # pyplot would keep the figure and look for a display.
        figure = Figure(figsize=(1.6 + 5.2 * len(batch_sizes), 5.2), layout="constrained")
        panels = figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0]
        for axes, batch_size in zip(panels, batch_sizes, strict=True):
            _draw(axes, report, batch_size)
        panels[0].set_ylabel("latency, ms (median; bars: 95 % confidence)")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.suptitle(_title(report), fontsize=10)
        figure.supxlabel(environment_line(report), fontsize=7, color="#404040")
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(axes: "Axes", report: BenchReport, batch_size: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    cached = report.graph == "cached"
    rows = [row for row in report.results if row.batch_size == batch_size and row.latency_ms is not None]
    names = list(dict.fromkeys(row.name for row in report.results))
    # Indexed by all names of the report, so that a candidate looks the same in every panel.
    styles = dict(zip(names, zip(cycle(_MARKERS), cycle(_LINES), cycle(_SHADES), strict=False), strict=False))
    longest = max((_length(row, cached) for row in rows), default=0)
    # The legend lists the lines in the vertical order of their right ends.
    for name in sorted(names, key=lambda name: -_latency_at(rows, name, longest, cached)):
        own = [row for row in rows if row.name == name]
        marker, line, shade = styles[name]
        axes.errorbar(
            [_length(row, cached) for row in own],
            [row.latency_ms or 0.0 for row in own],
            yerr=_bars(own),
            label=name,
            marker=marker,
            linestyle=line,
            color=shade,
            markersize=5.5 if name != report.baseline else 7,
            linewidth=1.2 if name != report.baseline else 2,
            markerfacecolor="white" if name != report.baseline else shade,
            elinewidth=0.8,
            capsize=2,
        )
    _draw_limit(axes, report, rows, cached)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    lengths = sorted({_length(row, cached) for row in rows})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("tokens in the cache" if cached else "sequence length")
    if len(report.sizes) and len({size.batch_size for size in report.sizes}) > 1:
        axes.set_title(f"batch size {batch_size}", fontsize=9)


def _draw_limit(axes: "Axes", report: BenchReport, rows: list[Row], cached: bool) -> None:
    """Draw the time of a block whose every operation runs at the rate of the machine's matrix products."""
    differential = sorted({(_length(row, cached), row.block_gflop) for row in rows if row.impl not in SOFTMAX_BLOCKS})
    if differential:
        rate = report.environment.matmul_gflop_per_second
        limits = [1e3 * gflop / rate for _, gflop in differential]
        style: dict[str, Any] = {
            "label": f"matrix-product limit of\nthe differential block\n({rate:.0f} GFLOP/s)",
            "color": "#808080",
            "linewidth": 3,
            "linestyle": ":",
        }
        if len(limits) == 1:  # a line from one point to itself would not be seen
            axes.axhline(limits[0], **style)
        else:
            axes.plot([length for length, _ in differential], limits, **style)


def _length(row: Row, cached: bool) -> int:
    return row.past_sequence_length if cached else row.sequence_length


def _latency_at(rows: list[Row], name: str, length: int, cached: bool) -> float:
    return max((row.latency_ms or 0.0 for row in rows if (row.name, _length(row, cached)) == (name, length)), default=0)


def _bars(rows: list[Row]) -> list[list[float]] | None:
    if any(row.latency_low_ms is None or row.latency_high_ms is None for row in rows):
        return None
    return [
        [(row.latency_ms or 0.0) - (row.latency_low_ms or 0.0) for row in rows],
        [(row.latency_high_ms or 0.0) - (row.latency_ms or 0.0) for row in rows],
    ]


def _title(report: BenchReport) -> str:
    block = report.block
    sizes = f"D {block.embed_dim}, h {block.num_heads}, h_kv {block.num_kv_heads}, d {block.head_dim}"
    what = {"plain": "prefill", "masked": "prefill of a padded batch", "cached": "one token with a cache"}[report.graph]
    return f"Differential attention, whole block: {what}; {sizes}; {report.dtype}"


def environment_line(report: BenchReport) -> str:
    """Describe the machine and the software of a run in one line."""
    environment = report.environment
    versions = ", ".join(f"{name} {found}" for name, found in environment.packages.items() if name != "numpy")
    where = environment.device if environment.device != "cpu" else environment.cpu
    others = "" if environment.other_load is None else f"; other processes: {environment.other_load:.2f} cores"
    return f"{where}, {environment.threads} threads; {versions}{others}"
