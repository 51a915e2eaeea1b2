"""A benchmark from its plan to its report: processes are started, and their events become figures.

All candidates are timed in one process with the plan's number of threads; the memory of each candidate is measured in a
separate process. `Bench.report` can be called at any time, even after an interrupt.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from diffdeploy.bench.collected import Collected, Key
from diffdeploy.bench.estimate import fits_twice
from diffdeploy.bench.machine import Machine
from diffdeploy.bench.measuring_process import MeasuringProcess
from diffdeploy.bench.medians import estimate, rounded, times
from diffdeploy.bench.operations import attention_flop, block_flop
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.bench.results import BenchReport, Block, Row
from diffdeploy.runtime.machine import free_bytes

__all__ = ["STEADY_MALLOC", "Bench", "Progress"]

# Description of the current step, and the seconds left if known.
Progress = Callable[[str, float | None], None]

# Assumed durations of one size and of one memory measurement, for the estimate of the remaining time.
_SECONDS_PER_SIZE, _SECONDS_PER_MEMORY = 20.0, 3.0
# Settings of glibc's allocator (man 3 mallopt). When times are measured, freed memory is kept, as it is after a while
# in a process that serves similar calls; by default, how much is kept depends on what other candidates have freed, and
# ratios change by 30 % from run to run. When memory is measured, larger tensors are returned to the system when they
# are freed, so that only live memory is resident.
# To measure times: never use mmap, keep up to 16 GiB, and grow by 64 MiB at a time.
STEADY_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
# To measure memory: use mmap from 64 KiB on.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


class Bench(Collected):
    """One run of a plan.

    Args:
        plan: plan of the run.
        block: description of the block, for the report.
        command: command that repeats the measurement.
    """

    def __init__(self, plan: Plan, block: Block, command: str) -> None:
        super().__init__()
        self.plan, self.block, self._command = plan, block, command
        self._memory: dict[Key, dict[str, int]] = {}

    def measure(self, progress: Progress) -> None:
        """Time all candidates, then measure the memory of those that are correct.

        Raises:
            DiffDeployError: a measuring process failed.
        """
        with tempfile.TemporaryDirectory(prefix="diffdeploy-bench-") as folder:
            plan_file = Path(folder) / "plan.json"
            plan_file.write_text(self.plan.model_dump_json())
            self._measure_times(plan_file, progress)
            self._measure_memory(plan_file, progress)
        self._finished = True

    def _measure_times(self, plan_file: Path, progress: Progress) -> None:
        ids = [size.id for size in self.plan.sizes]
        current = 0
        with MeasuringProcess(
            ["time", str(plan_file)], threads=self.plan.threads, environment=STEADY_MALLOC
        ) as process:
            for event in process.events():
                if event["event"] == "phase":
                    here = event.get("seconds_left", _SECONDS_PER_SIZE)
                    later = _SECONDS_PER_SIZE * (len(ids) - current - 1)
                    progress(event["text"], here + later + _SECONDS_PER_MEMORY * len(self.plan.candidates))
                    continue
                self._take(event)
                if event["event"] == "verdict":
                    current = ids.index(event["size"])

    def _take(self, event: dict[str, Any]) -> None:
        """See `Collected`; the memory of a candidate is stored, too."""
        super()._take(event)
        if event["event"] == "memory":
            self._memory[event["size"], event["name"]] = event

    def _measure_memory(self, plan_file: Path, progress: Progress) -> None:
        """Measure in two processes at a time, if there is memory for two, since they do not see each other's memory."""
        # A wrong candidate may need less memory because it leaves something out.
        right = [candidate for candidate in self.plan.candidates if self._is_right(candidate)]
        at_once = 2 if fits_twice(self.plan, free_bytes(self.plan.device)) else 1
        with ExitStack() as stack:
            started: list[MeasuringProcess] = []
            for number, candidate in enumerate(right):
                # The next process starts and imports torch while the current one measures.
                for next_one in right[len(started) : number + at_once]:
                    process = MeasuringProcess(
                        ["memory", str(plan_file), next_one.name], threads=self.plan.threads, environment=_EXACT_MALLOC
                    )
                    started.append(stack.enter_context(process))
                progress(f"memory of {candidate.name}", _SECONDS_PER_MEMORY * (len(right) - number))
                for event in started[number].events():
                    self._take(event)

    def _is_right(self, candidate: Candidate) -> bool:
        return all(self._verdicts[size.id, candidate.name]["passed"] for size in self.plan.sizes)

    def report(self) -> BenchReport | None:
        """Report on the measurements so far; ``None`` if there are none."""
        if self._environment is None or not self._verdicts:
            return None
        rows = [
            self._row(size, candidate, self._environment)
            for size in self.plan.sizes
            for candidate in self.plan.candidates
            if (size.id, candidate.name) in self._verdicts
        ]
        return BenchReport(
            status=self._status(rows),
            command=self._command,
            block=self.block,
            graph=self.plan.graph,
            dtype=self.plan.dtype,
            baseline=self.plan.baseline,
            results=rows,
            environment=self._environment,
        )

    def _row(self, size: Size, candidate: Candidate, environment: Machine) -> Row:
        key = size.id, candidate.name
        verdict, memory, samples = self._verdicts[key], self._memory.get(key), self._samples[key]
        config, softmax = self.plan.config, candidate.is_softmax
        flop = block_flop(config, size, candidate)
        status = "wrong" if not verdict["passed"] else "measured" if samples else "unmeasured"
        return Row(
            name=candidate.name,
            impl=candidate.impl,
            format=candidate.format,
            **size.model_dump(),
            status=status,
            reason=verdict["reason"],
            budget_used=verdict["budget_used"],
            captured=verdict["captured"],
            block_gflop=flop / 1e9,
            attention_gflop=attention_flop(config, size, softmax=softmax) / 1e9,
            **self._times(samples, self._samples[size.id, self.plan.baseline], flop, environment),
            **({} if memory is None else _memory_fields(memory)),
        )

    def _times(self, samples: list[float], baseline: list[float], flop: int, environment: Machine) -> dict[str, Any]:
        if not samples:
            return {}
        # 10^6 operations per millisecond are 10^9 per second.
        rate = flop / estimate(samples).median / 1e6
        fields = {
            **times(samples, baseline),
            "gflop_per_second": rate,
            "matmul_share": rate / environment.matmul_gflop_per_second,
        }
        return {name: rounded(value) for name, value in fields.items()}


def _memory_fields(event: dict[str, int]) -> dict[str, int]:
    peak, weights = event["peak_bytes"], event["weight_bytes"]
    return {"peak_bytes": peak, "weight_bytes": weights, "extra_bytes": peak - weights}
