"""A benchmark of models from its plan to its report. `ModelBench.report` can also be called after an interrupt."""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from diffdeploy.bench.collected import Collected, Key
from diffdeploy.bench.measuring_process import MeasuringProcess
from diffdeploy.bench.medians import estimate, paired_ratios, rounded, times
from diffdeploy.bench.models.plan import ModelCandidate, ModelPlan, ModelSize
from diffdeploy.bench.models.results import Model, ModelReport, ModelRow
from diffdeploy.bench.run import STEADY_MALLOC, Progress

__all__ = ["ModelBench"]

# Assumed duration of one size, for the estimate of the remaining time.
_SECONDS_PER_SIZE = 20.0


class ModelBench(Collected):
    """One run of a plan.

    Args:
        plan: plan of the run.
        model: description of the model, for the report.
        command: command that repeats the measurement.
    """

    def __init__(self, plan: ModelPlan, model: Model, command: str) -> None:
        super().__init__()
        self.plan, self.model, self._command = plan, model, command
        # Times of bare calls in milliseconds.
        self._bare: dict[Key, list[float]] = defaultdict(list)

    def measure(self, progress: Progress) -> None:
        """Time all candidates.

        Raises:
            DiffDeployError: the measuring process failed.
        """
        ids, current = [size.id for size in self.plan.sizes], 0
        with tempfile.TemporaryDirectory(prefix="diffdeploy-bench-") as folder:
            plan_file = Path(folder) / "plan.json"
            plan_file.write_text(self.plan.model_dump_json())
            with MeasuringProcess(
                [str(plan_file)],
                threads=self.plan.threads,
                environment=STEADY_MALLOC,
                module="diffdeploy.bench.models.worker",
            ) as process:
                for event in process.events():
                    if event["event"] == "phase":
                        later = _SECONDS_PER_SIZE * (len(ids) - current - 1)
                        progress(event["text"], event.get("seconds_left", _SECONDS_PER_SIZE) + later)
                    elif event["event"] == "verdict":
                        current = ids.index(event["size"])
                    self._take(event)
        self._finished = True

    def _take(self, event: dict[str, Any]) -> None:
        """See `Collected`; bare calls are stored separately."""
        if event["event"] == "sample" and event["bare"]:
            self._bare[event["size"], event["name"]].append(event["latency_ms"])
        else:
            super()._take(event)

    def report(self) -> ModelReport | None:
        """Report on the measurements so far; ``None`` if there are none."""
        if self._environment is None or not self._verdicts:
            return None
        rows = [
            self._row(size, candidate)
            for size in self.plan.sizes
            for candidate in self.plan.candidates
            if (size.id, candidate.name) in self._verdicts
        ]
        return ModelReport(
            status=self._status(rows),
            command=self._command,
            model=self.model,
            dtype=self.plan.dtype,
            baseline=self.plan.baseline,
            results=rows,
            environment=self._environment,
        )

    def _row(self, size: ModelSize, candidate: ModelCandidate) -> ModelRow:
        key = size.id, candidate.name
        verdict, samples = self._verdicts[key], self._samples[key]
        status = "wrong" if not verdict["passed"] else "measured" if samples else "unmeasured"
        return ModelRow(
            **candidate.model_dump(exclude={"path"}),
            **size.model_dump(),
            new_tokens=size.new_tokens,
            status=status,
            reason=verdict["reason"],
            budget_used=verdict["budget_used"],
            **self._figures(size, candidate.name),
        )

    def _figures(self, size: ModelSize, name: str) -> dict[str, Any]:
        # Latencies of decoding are per token, those of prefill per prompt.
        calls = size.new_tokens if size.what == "decode" else 1
        samples, baseline = (
            [sample / calls for sample in self._samples[size.id, each]] for each in (name, self.plan.baseline)
        )
        if not samples:
            return {}
        fields: dict[str, float | int | None] = dict(times(samples, baseline))
        tokens = size.batch_size * size.new_tokens / calls
        fields["tokens_per_second"] = 1e3 * tokens / estimate(samples).median
        if overheads := paired_ratios(samples, self._bare[size.id, name]):
            fields["generate_overhead"] = estimate(overheads).median - 1
        return {field: rounded(value) for field, value in fields.items()}
