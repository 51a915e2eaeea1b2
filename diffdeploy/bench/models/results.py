"""The result of a benchmark of models: one row per candidate and size, and their JSON and CSV forms."""

import json
from pathlib import Path
from typing import Any, Literal

from diffdeploy.bench.collected import Status, csv_text, fastest_first
from diffdeploy.bench.machine import Machine
from diffdeploy.bench.models.plan import ModelSize, What
from diffdeploy.errors import InputError
from diffdeploy.graphs import DType
from diffdeploy.records import Record

__all__ = ["Model", "ModelReport", "ModelRow", "read_model_report"]


class ModelRow(Record):
    """One candidate at one size.

    Attributes:
        name: name of the candidate.
        kind: kind of the candidate; see `ModelCandidate`.
        choice: format, implementation or attention; see `ModelCandidate`.
        what: ``prefill`` or ``decode``.
        batch_size: number of rows.
        length: number of tokens in a prompt, or in a past.
        new_tokens: number of tokens per row that a sample computed.
        status: ``wrong`` candidates are not timed; ``unmeasured`` ones were interrupted.
        reason: reason why a candidate is wrong.
        budget_used: error of the logits divided by the allowed error.
        num_rounds: number of samples of the latency.
        latency_ms: median latency over the rounds, for a prompt or for one token in each row.
        latency_low_ms: lower end of its 95 % confidence interval; ``None`` for fewer than six rounds.
        latency_high_ms: upper end of that interval.
        latency_iqr_ms: distance between the quartiles over the rounds.
        ratio: median over the rounds of the latency divided by that of the baseline in the same round.
        ratio_low: lower end of its 95 % confidence interval.
        ratio_high: upper end of that interval.
        tokens_per_second: rate of all rows together.
        generate_overhead: extra time of `generate` when a bundle decodes, relative to its bare runtime calls; median
            over the rounds.
        peak_bytes: always ``None``, since memory is not measured for models.
    """

    name: str
    kind: Literal["bundle", "eager", "transformers"]
    choice: str
    what: What
    batch_size: int
    length: int
    new_tokens: int
    status: Literal["measured", "wrong", "unmeasured"]
    reason: str | None = None
    budget_used: float | None = None
    num_rounds: int = 0
    latency_ms: float | None = None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_iqr_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    tokens_per_second: float | None = None
    generate_overhead: float | None = None
    peak_bytes: None = None

    @property
    def size(self) -> ModelSize:
        """Size that was run."""
        return ModelSize(what=self.what, batch_size=self.batch_size, length=self.length)


class Model(Record):
    """The model that was measured."""

    source: str
    num_layers: int
    embed_dim: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int


class ModelReport(Record):
    """Everything that one run measured.

    Attributes:
        schema_version: version of this record.
        status: ``wrong`` if a candidate was; ``interrupted`` if the run did not finish.
        command: command that repeats the measurement.
        model: the model that was measured.
        dtype: dtype of weights and caches.
        baseline: name of the candidate that ratios refer to.
        results: rows, by size and then in the order of the candidates.
        environment: the machine and its software.
    """

    schema_version: Literal[1] = 1
    status: Status
    command: str
    model: Model
    dtype: DType
    baseline: str
    results: list[ModelRow]
    environment: Machine

    @property
    def sizes(self) -> list[ModelSize]:
        """Sizes with results, in order."""
        return list(dict.fromkeys(row.size for row in self.results))

    def rows_of(self, size: ModelSize) -> list[ModelRow]:
        """Rows of a size, fastest first; those without a latency at the end."""
        return fastest_first(row for row in self.results if row.size == size)

    def fields(self) -> dict[str, Any]:
        """Fields for JSON; `read_model_report` is the inverse."""
        return {**self.model_dump(), "results": [_without_peak(row) for row in self.results]}

    def to_csv(self) -> str:
        """One line per row, with the environment in the last columns."""
        shared = {"dtype": self.dtype, "baseline": self.baseline, **self.environment.columns()}
        rows = [{**_without_peak(row), **shared} for row in self.results]
        return csv_text(list(rows[0]) if rows else [], rows)


def _without_peak(row: ModelRow) -> dict[str, Any]:
    return row.model_dump(exclude={"peak_bytes"})


def read_model_report(path: Path) -> ModelReport:
    """Read a report that was saved as the JSON of `ModelReport.fields`.

    Raises:
        InputError: the file cannot be read, or does not contain such a report.
    """
    try:
        return ModelReport.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a diffdeploy bench result for a model; give a file that --save wrote"
        ) from error
