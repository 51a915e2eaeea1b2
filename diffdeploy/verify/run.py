"""Verifying a bundle: the exact formula, the eager block and the artifact on every case, and the contract."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array, read_safetensors, to_array, to_tensor
from diffdeploy.bundle import GOLDEN, WEIGHTS, Bundle, eager_block, open_bundle
from diffdeploy.config import AnyConfig
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.graphs import GraphSpec, run_block
from diffdeploy.runtime import RunOptions, require_runnable
from diffdeploy.verify import contracts
from diffdeploy.verify.cases import Case, golden_cases, sweep
from diffdeploy.verify.metrics import Yardstick, judge
from diffdeploy.verify.oracle import oracle
from diffdeploy.verify.report import CaseReport, Check, Report
from diffdeploy.verify.worker import ArtifactProcess

if TYPE_CHECKING:
    from diffdeploy.modules import AttentionBlock

__all__ = ["Progress", "golden_arrays", "verify_bundle"]

# Long sequences average over enough numbers by themselves.
_EAGER_RUNS, _EAGER_RUNS_WHEN_LONG, _SHORT = 8, 2, 256

Progress = Callable[[int, int, str], None]


def golden_arrays(config: AnyConfig, spec: GraphSpec, weights: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Inputs and exact outputs of `golden_cases`, named ``CASE.NAME``."""
    arrays: dict[str, Array] = {}
    for case in golden_cases(spec, seed):
        inputs = case.inputs(spec)
        arrays |= {f"{case.id}.{name}": array for name, array in inputs.items()}
        arrays |= {f"{case.id}.{name}": array for name, array in oracle(config, weights, inputs).items()}
    return arrays


def verify_bundle(
    path: str | Path,
    *,
    seed: int | None = None,
    progress: Progress | None = None,
    run_options: RunOptions | None = None,
) -> Report:
    """Verify a bundle from its own files.

    Three computations per case are compared: the formula in fp64 from ``weights.safetensors``, the eager block with
    ``impl="naive"`` in the artifact's dtype, and the artifact, run by the public runtime in a process of its own.

    Args:
        path: the bundle's directory.
        seed: of the inputs; by default the one the bundle was made with.
        progress: called with cases done, cases in all, and the name of the next one.
        run_options: device and backend that the artifact is run with.

    Raises:
        InputError: no bundle there.
        IntegrityError: the bundle is not what was exported.
        UnavailableError: this machine cannot run the format.
    """
    run_options = run_options or RunOptions()
    bundle = open_bundle(path)
    manifest = bundle.manifest
    require_runnable(manifest, run_options)
    if seed is None:
        seed = int(manifest.options["seed"])
    cases = sweep(manifest.config, manifest.graph, seed)
    with ArtifactProcess(bundle.path, run_options) as artifact:
        weights = read_safetensors(bundle.path / WEIGHTS)
        checks = contracts.checks(bundle, weights)
        exact_weights = {name: array.astype(np.float64) for name, array in weights.items()}
        checks.append(_golden(bundle, exact_weights))
        eager = eager_block(bundle, impl="naive")
        reports = []
        try:
            backend = artifact.backend
        except ExportError as error:
            backend, cases = "none", []
            checks.append(Check(name="loads", passed=False, detail=str(error)))
        for done, case in enumerate(cases):
            if progress is not None:
                progress(done, len(cases), case.id)
            reports.append(_run_case(case, bundle, artifact, eager, exact_weights))
    return Report(
        format=manifest.format,
        backend=backend,
        seed=seed,
        graph=contracts.facts(bundle),
        contract=checks,
        cases=reports,
    )


def _run_case(
    case: Case, bundle: Bundle, artifact: ArtifactProcess, eager: "AttentionBlock", exact_weights: Mapping[str, Array]
) -> CaseReport:
    spec = bundle.manifest.graph
    inputs = case.inputs(spec)
    if not case.chunks:
        artifact.start(inputs)
    expected = oracle(bundle.manifest.config, exact_weights, inputs)
    yardsticks = _eager_error(eager, case, inputs, expected)
    try:
        actual = _in_chunks(case, artifact, inputs) if case.chunks else artifact.result()
    except DiffDeployError as error:
        return CaseReport.failed(case.id, f"the artifact did not run: {error}")
    reports = [
        judge(case.id, name, actual[name], yardsticks[name], expected[name], spec.dtype) for name in spec.outputs
    ]
    return max(reports, key=lambda report: report.severity)


def _in_chunks(case: Case, artifact: ArtifactProcess, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Feed a sequence in several calls, each with the cache of the one before."""
    key, value = inputs["past_key_values.key"], inputs["past_key_values.value"]
    outputs, done = [], 0
    for chunk in case.chunks:
        part = {
            name: inputs[name][:, done : done + chunk] for name in ("hidden_states", "position_ids") if name in inputs
        }
        part["attention_mask"] = inputs["attention_mask"][:, : done + chunk]
        artifact.start({**part, "past_key_values.key": key, "past_key_values.value": value})
        result = artifact.result()
        key, value = result["present.key"], result["present.value"]
        outputs.append(result["output"])
        done += chunk
    return {"output": np.concatenate(outputs, axis=1), "present.key": key, "present.value": value}


def _eager_error(
    eager: "AttentionBlock", case: Case, inputs: Mapping[str, Array], expected: Mapping[str, Array]
) -> dict[str, Yardstick]:
    import torch

    yardsticks = {name: Yardstick(array) for name, array in expected.items()}
    generator = np.random.default_rng(case.seed)
    x_BSD = inputs["hidden_states"]
    infinity = np.asarray(np.inf, x_BSD.dtype)
    for run in range(_EAGER_RUNS if x_BSD.shape[1] <= _SHORT else _EAGER_RUNS_WHEN_LONG):
        # Equal positions stay equal: what makes them hard is that their roundings do not average out.
        shape = (len(x_BSD), 1, x_BSD.shape[2]) if case.kind == "constant" else x_BSD.shape
        directions = generator.choice([-1, 1], shape).astype(x_BSD.dtype) * infinity
        nudged = {**inputs, "hidden_states": x_BSD if run == 0 else np.nextafter(x_BSD, directions)}
        with torch.no_grad():
            outputs = run_block(eager, {name: to_tensor(array) for name, array in nudged.items()})
        for name, yardstick in yardsticks.items():
            yardstick.add(to_array(outputs[name]))
    return yardsticks


def _golden(bundle: Bundle, exact_weights: Mapping[str, Array]) -> Check:
    """The stored exact outputs must be what the formula gives here and now."""
    manifest = bundle.manifest
    stored = read_safetensors(bundle.path / GOLDEN)
    fresh = golden_arrays(manifest.config, manifest.graph, exact_weights, int(manifest.options["seed"]))
    problems = [] if stored.keys() == fresh.keys() else [f"it holds {sorted(stored)}, expected {sorted(fresh)}"]
    for name in stored.keys() & fresh.keys():
        scale = float(np.abs(fresh[name]).max(initial=0.0))
        if stored[name].shape != fresh[name].shape or not np.allclose(
            stored[name], fresh[name], rtol=0.0, atol=1e-10 * scale
        ):
            problems.append(f"{name} is not what the formula gives")
    return Check(name="golden", passed=not problems, detail="; ".join(problems) or "stored outputs are the formula's")
