"""The process that measures models; all candidates take turns. Events go to standard output, one line of JSON each."""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffdeploy.arrays import Array
from diffdeploy.bench import timing
from diffdeploy.bench.correctness import Verdict
from diffdeploy.bench.machine import Machine, OtherLoad, matmul_gflop_per_second
from diffdeploy.bench.models.candidate_runs import ModelRun, open_model
from diffdeploy.bench.models.correctness import (
    expected_logits,
    judge_logits,
    quantised_activations,
    tokens_of,
)
from diffdeploy.bench.models.plan import ModelPlan, ModelSize
from diffdeploy.bundle import Quantisation
from diffdeploy.errors import DiffDeployError
from diffdeploy.verify.metrics import Yardstick

Send = Callable[..., None]
Call = Callable[[], object]

# Suffix of a candidate's name for the bare calls of its runtime; names of folders cannot contain this character.
_BARE = "\0"


def _time(plan: ModelPlan, send: Send) -> None:
    environment = Machine.current(dtype=plan.dtype, device=plan.device, threads=plan.threads)
    send("environment", environment=environment.model_dump())
    runs: dict[str, ModelRun] = {}
    for candidate in plan.candidates:
        send("phase", text=f"loading {candidate.name}")
        runs[candidate.name] = open_model(plan, candidate)
    other_load = OtherLoad()
    for size in plan.sizes:
        _time_size(plan, size, runs, send)
        # Read before the matrix products, which are not among the timed calls.
        busy = other_load()
        send(
            "machine",
            other_load=busy,
            matmul_gflop_per_second=matmul_gflop_per_second(plan.dtype, device=plan.device, threads=plan.threads),
        )


def _time_size(plan: ModelPlan, size: ModelSize, runs: Mapping[str, ModelRun], send: Send) -> None:
    calls, seconds = _right_ones(plan, size, runs, send)
    if not calls:
        return
    fitting, round_seconds = timing.num_rounds(seconds)
    count = plan.rounds or fitting
    rounds = timing.rounds(calls, count, device=plan.device, threads=plan.threads, seed=plan.seed)
    for number, name, latency_ms in rounds:
        candidate, bare, _ = name.partition(_BARE)
        send("sample", size=size.id, name=candidate, latency_ms=latency_ms, bare=bool(bare))
        send(
            "phase",
            text=f"{size.id}: round {number + 1} of {count}",
            seconds_left=round_seconds * (count - number - 1),
        )


def _right_ones(
    plan: ModelPlan, size: ModelSize, runs: Mapping[str, ModelRun], send: Send
) -> tuple[dict[str, Call], dict[str, float]]:
    """Check all candidates; return calls of the correct ones, with their approximate durations."""
    decodes = size.what == "decode"
    tokens = tokens_of(plan, size.batch_size, size.length + decodes)
    send("phase", text=f"{size.id}: exact result")
    expected: dict[Quantisation | None, Yardstick] = {None: expected_logits(plan, tokens)}
    calls: dict[str, Call] = {}
    for candidate in plan.candidates:
        if (how := quantised_activations(candidate)) not in expected:
            expected[how] = expected_logits(plan, tokens, how)
        send("phase", text=f"{size.id}: checking {candidate.name}")
        try:
            logits, found = _calls(candidate.name, runs[candidate.name], tokens, decodes=decodes)
            verdict = judge_logits(logits, expected[how])
        except Exception as error:  # noqa: BLE001 - a candidate that fails is wrong, and the others are measured
            verdict, found = Verdict(False, None, f"it did not run: {type(error).__name__}: {error}"), {}
        send("verdict", size=size.id, name=candidate.name, **vars(verdict))
        if verdict.passed:
            calls |= found
    return calls, {name: timing.seconds_per_call(call, device=plan.device) for name, call in calls.items()}


def _calls(name: str, run: ModelRun, tokens: Array, *, decodes: bool) -> tuple[Array, dict[str, Call]]:
    """Logits to judge, and the calls to time, by name."""
    if not decodes:
        return run.prefill(tokens), {name: partial(run.prefill, tokens)}
    logits, call, bare_call = run.decoder(tokens)
    return logits, {name: call} | ({} if bare_call is None else {name + _BARE: bare_call})


def _main(plan_file: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that started this one
    # Line by line, so that nothing is lost if the process dies.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    def send(event: str, **fields: Any) -> None:
        stdout.write(json.dumps({"event": event, **fields}) + "\n")

    plan = ModelPlan.model_validate_json(Path(plan_file).read_bytes())
    torch.set_num_threads(plan.threads)
    try:
        with torch.inference_mode():
            _time(plan, send)
    except DiffDeployError as error:
        send("error", message=str(error), kind=type(error).__name__)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
