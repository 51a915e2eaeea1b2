"""The figures of a run as words and columns, for any output."""

from diffdeploy.bench.machine import Machine
from diffdeploy.bench.operations import FORMULA
from diffdeploy.bench.plan import SOFTMAX_BLOCKS, Size
from diffdeploy.bench.results import BenchReport, Row

__all__ = ["HEADINGS", "describe_block", "describe_size", "figures", "legend", "machine", "machine_rows"]

HEADINGS = ("candidate", "ms", "±", "ratio", "95 %", "GFLOP/s", "of matmul", "peak MiB", "extra MiB")

_MIB = 2**20
# Number of decimals of values below a bound, for three significant digits; confidence intervals seldom justify more.
_DECIMALS = ((1, 3), (10, 2), (100, 1))
# Number of busy cores above which the spread of repeated runs grows.
_QUIET = 0.1


def figures(row: Row) -> list[str]:
    """Format one row, in the columns of `HEADINGS`."""
    if row.status == "wrong":
        return [row.name, "wrong", *[""] * 7]
    if row.latency_ms is None:
        return [row.name, "not timed", *[""] * 7]
    # Half the distance, so that it reads as a plus or minus around the median.
    spread = None if row.latency_iqr_ms is None else row.latency_iqr_ms / 2 / row.latency_ms
    known = row.ratio_low is not None and row.ratio_high is not None
    return [
        row.name,
        _three_digits(row.latency_ms),
        _or_dash(spread, ".1%"),
        _or_dash(row.ratio, ".3f"),
        f"{row.ratio_low:.3f}-{row.ratio_high:.3f}" if known else "-",
        "-" if row.gflop_per_second is None else _three_digits(row.gflop_per_second),
        _or_dash(row.matmul_share, ".0%"),
        _or_dash(None if row.peak_bytes is None else row.peak_bytes / _MIB, ".1f"),
        _or_dash(None if row.extra_bytes is None else row.extra_bytes / _MIB, ".1f"),
    ]


def _three_digits(value: float) -> str:
    return f"{value:.{next((decimals for bound, decimals in _DECIMALS if value < bound), 0)}f}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def describe_size(report: BenchReport, size: Size) -> str:
    """Heading of a size: the input, and its number of operations."""
    rows = report.rows_of(size)
    # The heading counts the differential block; softmax needs fewer operations.
    counted = next((row for row in rows if row.impl not in SOFTMAX_BLOCKS), rows[0])
    what = f"sequence length {size.sequence_length}"
    if size.past_sequence_length:
        what = f"one token after a past of {size.past_sequence_length}"
    return (
        f"{what}, batch {size.batch_size}: {counted.block_gflop:.3g} GFLOP, {counted.attention_gflop:.3g} of it in "
        f"attention{_captured(rows)}"
    )


def _captured(rows: list[Row]) -> str:
    if not any(row.captured for row in rows):
        return ""
    others = [row.name for row in rows if row.latency_ms is not None and not row.captured]
    return "; timed as CUDA graphs" + (f", except {', '.join(others)}" if others else "")


def describe_block(report: BenchReport) -> str:
    """Describe the block, the graph and the dtype."""
    block = report.block
    kind = "" if block.causal else ", not causal"
    window = "" if block.sliding_window is None else f", window {block.sliding_window}"
    rope = "" if block.rope is None else f", rope {block.rope}"
    return (
        f"{block.source}: D {block.embed_dim}, h {block.num_heads}, h_kv {block.num_kv_heads}, d {block.head_dim}"
        f"{kind}{window}{rope}; {report.graph} graph, {report.dtype}"
    )


def machine(report: BenchReport) -> list[tuple[str, str]]:
    """The machine of a report, as names and values."""
    return [("block", describe_block(report)), *machine_rows(report.environment, report.dtype)]


def machine_rows(environment: Machine, dtype: str) -> list[tuple[str, str]]:
    """The machine and its software, as names and values."""
    versions = ", ".join(f"{name} {found}" for name, found in environment.packages.items())
    where = environment.cpu if environment.device == "cpu" else f"{environment.device} with {environment.cpu}"
    meanwhile = ""
    if environment.other_load is not None:
        noisy = ", so the times are noisy" if environment.other_load > _QUIET else ""
        meanwhile = f"; other processes kept {environment.other_load:.2f} cores busy during the run{noisy}"
    return [
        ("machine", f"{where}, {environment.num_cpus} cores, {environment.threads} threads"),
        ("load", f"{environment.load_average:.2f} in the minute before{meanwhile}"),
        (
            "matrix products",
            f"{environment.matmul_gflop_per_second:.0f} GFLOP/s in {dtype}, the highest rate for square matrices",
        ),
        *([] if environment.gpu is None else [("clocks and power", environment.gpu)]),
        ("versions", f"diffdeploy {environment.diffdeploy}, Python {environment.python}, {versions}"),
    ]


def legend(baseline: str) -> list[tuple[str, str]]:
    """Explanation of the columns, as names and lines; a name is empty if a line continues the previous one."""
    return [
        ("latency", "median over rounds, in which candidates take turns; ± is half the interquartile range;"),
        ("", "freed memory is kept, so that no page is mapped again, as in a process that serves similar calls"),
        ("ratio", f"median of the ratios to {baseline} in the same round, with its 95 % confidence interval"),
        ("memory", "peak during a call, with the weights (peak) and without them (extra)"),
        *(("" if number else "operations", line) for number, line in enumerate(FORMULA)),
    ]
