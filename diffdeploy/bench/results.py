"""The result of a benchmark: one row per candidate and size, the environment, and their JSON and CSV forms."""

import json
from pathlib import Path
from typing import Any, Literal

from diffdeploy.bench.collected import Status, csv_text, fastest_first
from diffdeploy.bench.machine import Machine
from diffdeploy.bench.plan import Size
from diffdeploy.errors import InputError
from diffdeploy.graphs import DType, Variant
from diffdeploy.records import Record

__all__ = ["BenchReport", "Block", "Row", "read_report"]


class Row(Record):
    """One candidate at one size.

    Attributes:
        name: name of the candidate.
        impl: implementation of the eager block, or ``softmax``; ``None`` for a bundle.
        format: format of a bundle; ``None`` for an eager block.
        batch_size: number of rows; `Size` describes this and the two lengths.
        sequence_length: number of tokens per row in this call.
        past_sequence_length: number of tokens per row in the cache.
        status: ``wrong`` candidates are not timed; ``unmeasured`` ones were interrupted.
        reason: reason why a candidate is wrong.
        budget_used: error divided by the allowed error, if the candidate was checked.
        captured: true if it was timed as a CUDA graph.
        num_rounds: number of samples of the latency.
        latency_ms: median over the rounds.
        latency_low_ms: lower end of its 95 % confidence interval; ``None`` for fewer than six rounds.
        latency_high_ms: upper end of that interval.
        latency_iqr_ms: distance between the quartiles over the rounds.
        ratio: median over the rounds of the latency divided by that of the baseline in the same round.
        ratio_low: lower end of its 95 % confidence interval.
        ratio_high: upper end of that interval.
        peak_bytes: memory while it runs, weights included.
        weight_bytes: memory of the weights alone.
        extra_bytes: ``peak_bytes`` minus ``weight_bytes``.
        block_gflop: counted operations of the block, in 10^9.
        attention_gflop: counted operations of its attention alone, in 10^9.
        gflop_per_second: ``block_gflop`` over the latency.
        matmul_share: share of the machine's matrix-product rate.
    """

    name: str
    impl: str | None
    format: str | None
    batch_size: int
    sequence_length: int
    past_sequence_length: int
    status: Literal["measured", "wrong", "unmeasured"]
    reason: str | None = None
    budget_used: float | None = None
    captured: bool = False
    num_rounds: int = 0
    latency_ms: float | None = None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_iqr_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    extra_bytes: int | None = None
    block_gflop: float
    attention_gflop: float
    gflop_per_second: float | None = None
    matmul_share: float | None = None

    @property
    def size(self) -> Size:
        """Size of its input."""
        return Size(
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            past_sequence_length=self.past_sequence_length,
        )

    def fields(self) -> dict[str, Any]:
        """Fields for JSON, with only the one of ``impl`` and ``format`` that applies."""
        return {
            name: value
            for name, value in self.model_dump().items()
            if name not in ("impl", "format") or value is not None
        }


class Block(Record):
    """The block that was measured: its sizes, and the origin of its weights."""

    source: str
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    version: int
    causal: bool
    rope: str | None
    sliding_window: int | None


class BenchReport(Record):
    """Everything that one run measured.

    Attributes:
        schema_version: version of this record.
        status: ``wrong`` if a candidate was; ``interrupted`` if the run did not finish.
        command: command that repeats the measurement.
        block: the block that was measured.
        graph: variant of the graph.
        dtype: dtype of weights and inputs.
        baseline: name of the candidate that ratios refer to.
        results: rows, by size and then in the order of the candidates.
        environment: the machine and its software.
    """

    schema_version: Literal[1] = 1
    status: Status
    command: str
    block: Block
    graph: Variant
    dtype: DType
    baseline: str
    results: list[Row]
    environment: Machine

    @property
    def sizes(self) -> list[Size]:
        """Sizes with results, in order."""
        return list(dict.fromkeys(row.size for row in self.results))

    def rows_of(self, size: Size) -> list[Row]:
        """Rows of a size, fastest first; those without a latency at the end."""
        return fastest_first(row for row in self.results if row.size == size)

    def fields(self) -> dict[str, Any]:
        """Fields for JSON; `read_report` is the inverse."""
        return {**self.model_dump(), "results": [row.fields() for row in self.results]}

    def to_csv(self) -> str:
        """One line per row, with the environment in the last columns."""
        environment = self.environment.columns()
        shared = {"graph": self.graph, "dtype": self.dtype, "baseline": self.baseline, **environment}
        return csv_text([*Row.model_fields, *shared], ({**row.model_dump(), **shared} for row in self.results))


def read_report(path: Path) -> BenchReport:
    """Read a report that was saved as the JSON of `BenchReport.fields`.

    Raises:
        InputError: the file cannot be read, or does not contain such a report.
    """
    # `Row.fields` omits `impl` or `format`, whichever does not apply to a row.
    neither = {"impl": None, "format": None}
    try:
        stored = json.loads(path.read_bytes())
        return BenchReport.model_validate({**stored, "results": [{**neither, **row} for row in stored["results"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a result of diffdeploy bench; give a file that --save wrote") from error
