"""A benchmark of models from its plan to its report. `ModelBench.report` can be asked also after an interrupt."""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from diffdeploy.bench.machine import Machine
from diffdeploy.bench.measuring_process import MeasuringProcess
from diffdeploy.bench.medians import estimate, paired_ratios, rounded, times
from diffdeploy.bench.models.plan import ModelCandidate, ModelPlan, ModelSize
from diffdeploy.bench.models.results import Model, ModelReport, ModelRow
from diffdeploy.bench.run import STEADY_MALLOC, Progress

__all__ = ["ModelBench"]

_Key = tuple[str, str]  # a size's id and a candidate's name

# Until one has been seen.
_SECONDS_PER_SIZE = 20.0


class ModelBench:
    """One run of a plan.

    Args:
        plan: what to measure.
        model: what the report says of the model.
        command: that measures the same again.
    """

    def __init__(self, plan: ModelPlan, model: Model, command: str) -> None:
        self.plan, self.model, self._command = plan, model, command
        self._environment: Machine | None = None
        # Milliseconds of samples, whole ones and bare calls.
        self._samples: dict[_Key, list[float]] = defaultdict(list)
        self._bare: dict[_Key, list[float]] = defaultdict(list)
        self._verdicts: dict[_Key, dict[str, Any]] = {}
        self._finished = False

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
        """Keep what the process has measured."""
        match event["event"]:
            case "environment":
                self._environment = Machine.model_validate(event["environment"])
            case "machine" if self._environment is not None:
                self._environment = self._environment.updated(event["other_load"], event["matmul_gflop_per_second"])
            case "verdict":
                self._verdicts[event["size"], event["name"]] = event
            case "sample":
                samples = self._bare if event["bare"] else self._samples
                samples[event["size"], event["name"]].append(event["latency_ms"])

    def report(self) -> ModelReport | None:
        """What has been measured so far; ``None`` when there is nothing."""
        if self._environment is None or not self._verdicts:
            return None
        rows = [
            self._row(size, candidate)
            for size in self.plan.sizes
            for candidate in self.plan.candidates
            if (size.id, candidate.name) in self._verdicts
        ]
        wrong = any(row.status == "wrong" for row in rows)
        return ModelReport(
            status="interrupted" if not self._finished else "wrong" if wrong else "measured",
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
        # Decoding is told by the token, a prompt as a whole.
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
