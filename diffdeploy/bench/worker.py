"""The measuring process: with ``time PLAN``, all candidates take turns; ``memory PLAN NAME`` runs only one of them.

Events go to standard output, one line of JSON each; the output of backends is redirected to standard error.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.bench import timing
from diffdeploy.bench.candidate_run import Run, formula_of, inputs_of, load_weights, open_candidate, weight_bytes
from diffdeploy.bench.correctness import expected_outputs, judge_candidate
from diffdeploy.bench.machine import Machine, OtherLoad, matmul_gflop_per_second
from diffdeploy.bench.memory import peak_bytes
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.bundle import open_bundle
from diffdeploy.errors import DiffDeployError
from diffdeploy.formats import require_format
from diffdeploy.verify.metrics import Yardstick

if TYPE_CHECKING:
    from torch import Tensor

Send = Callable[..., None]
Call = Callable[[], object]
Inputs = Mapping[str, "Tensor"]
Expected = Mapping[str, Yardstick]


def _time(plan: Plan, send: Send) -> None:
    environment = Machine.current(dtype=plan.dtype, device=plan.device, threads=plan.threads)
    send("environment", environment=environment.model_dump())
    weights = load_weights(plan)
    runs: dict[str, Run] = {}
    for candidate in plan.candidates:
        send("phase", text=f"loading {candidate.name}")
        runs[candidate.name] = open_candidate(plan, candidate, weights)
    other_load = OtherLoad()
    for size in plan.sizes:
        _time_size(plan, size, runs, weights, send)
        # Read before the matrix products, which are not among the timed calls.
        busy = other_load()
        rate = matmul_gflop_per_second(plan.dtype, device=plan.device, threads=plan.threads)
        send("machine", other_load=busy, matmul_gflop_per_second=rate)


def _time_size(plan: Plan, size: Size, runs: Mapping[str, Run], weights: Inputs, send: Send) -> None:
    calls, seconds = _right_ones(plan, size, runs, weights, send)
    if not calls:
        return
    fitting, round_seconds = timing.num_rounds(seconds)
    count = plan.rounds or fitting
    for number, name, latency_ms in timing.rounds(
        calls, count, device=plan.device, threads=plan.threads, seed=plan.seed
    ):
        send("sample", size=size.id, name=name, latency_ms=latency_ms)
        left = round_seconds * (count - number - 1)
        send("phase", text=f"{size.id}: round {number + 1} of {count}", seconds_left=left)


def _right_ones(
    plan: Plan, size: Size, runs: Mapping[str, Run], weights: Inputs, send: Send
) -> tuple[dict[str, Call], dict[str, float]]:
    """Check all candidates; return calls of the correct ones, with their approximate durations."""
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    formulas: dict[bool, tuple[Inputs, Expected]] = {}
    for candidate in plan.candidates:
        # Softmax has a different exact result and a different cache shape; all other candidates share theirs.
        formula = candidate.is_softmax
        if formula not in formulas:
            send("phase", text=f"{size.id}: exact result")
            formulas[formula] = _inputs_and_expected(plan, candidate, size, weights)
        inputs, expected = formulas[formula]
        send("phase", text=f"{size.id}: checking {candidate.name}")
        verdict = judge_candidate(runs[candidate.name], inputs, expected)
        call, graph = partial(runs[candidate.name], inputs), None
        if verdict.passed and _decodes_on_cuda(plan) and _is_seen_by_torch(candidate):
            graph = timing.as_cuda_graph(call)
        send("verdict", size=size.id, name=candidate.name, captured=graph is not None, **vars(verdict))
        if verdict.passed:
            calls[candidate.name] = graph or call
            # By now the candidate has been called once, which may have compiled code or packed weights.
            seconds[candidate.name] = timing.seconds_per_call(calls[candidate.name], device=plan.device)
    return calls, seconds


def _decodes_on_cuda(plan: Plan) -> bool:
    """True if kernels are so short that launching them takes longer than running them."""
    return plan.graph == "cached" and plan.device == "cuda"


def _inputs_and_expected(plan: Plan, candidate: Candidate, size: Size, weights: Inputs) -> tuple[Inputs, Expected]:
    """Inputs on the plan's device, with their exact results."""
    config, own_weights = formula_of(plan, candidate, weights)
    inputs = inputs_of(plan, config, size)
    expected = expected_outputs(plan, config, own_weights, inputs, size)
    return {name: tensor.to(plan.device) for name, tensor in inputs.items()}, expected


def _measure_memory(plan: Plan, candidate: Candidate, send: Send) -> None:
    weights = load_weights(plan)
    config, _ = formula_of(plan, candidate, weights)
    smallest = Size(batch_size=1, sequence_length=1, past_sequence_length=int(plan.graph == "cached"))

    def inputs_on_device(size: Size) -> Inputs:
        return {name: tensor.to(plan.device) for name, tensor in inputs_of(plan, config, size).items()}

    if plan.device == "cuda" and not _is_seen_by_torch(candidate):
        return
    few = inputs_on_device(smallest)
    # Loads the libraries, whose memory does not belong to the candidate.
    open_candidate(plan, candidate, weights)(few)
    for size in plan.sizes:
        many = inputs_on_device(size)
        peak = peak_bytes(
            # Read again: these weights count, unlike those above, which are already resident.
            lambda: open_candidate(plan, candidate, load_weights(plan)),
            lambda run, inputs=many: run(inputs),  # type: ignore[misc]  # bound as a default, since it changes
            lambda run: run(few),
            device=plan.device,
        )
        send(
            "memory",
            size=size.id,
            name=candidate.name,
            peak_bytes=peak,
            weight_bytes=weight_bytes(candidate, weights),
        )


def _is_seen_by_torch(candidate: Candidate) -> bool:
    """True if a candidate's memory on CUDA comes from torch's allocator, whose peak is measured there."""
    if candidate.bundle is None:
        return True
    return require_format(open_bundle(candidate.bundle).manifest.format).torch_allocates


def _main(arguments: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that started this one
    # Line by line, so that nothing is lost if the process dies.
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    def send(event: str, **fields: Any) -> None:
        stdout.write(json.dumps({"event": event, **fields}) + "\n")

    what, plan_file, *names = arguments
    plan = Plan.model_validate_json(Path(plan_file).read_bytes())
    torch.set_num_threads(plan.threads)
    try:
        with torch.inference_mode():
            if what == "time":
                _time(plan, send)
            else:
                # Exactly one, since names in a plan are unique.
                (candidate,) = (each for each in plan.candidates if each.name == names[0])
                _measure_memory(plan, candidate, send)
    except DiffDeployError as error:
        send("error", message=str(error), kind=type(error).__name__)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
