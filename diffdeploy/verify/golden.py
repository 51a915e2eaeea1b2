"""Golden vectors: inputs with exact outputs that travel with a bundle, for machines with nothing but its runtime."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.budgets import BUDGETS
from diffdeploy.bundle import GOLDEN, REPORT, Bundle, Environment, open_bundle
from diffdeploy.config import AnyModel
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.formats import Check, RunOptions, distributions
from diffdeploy.graphs import GraphSpec
from diffdeploy.runtime import Runtime, load
from diffdeploy.verify.cases import Case
from diffdeploy.verify.coverage import covered
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.report import CaseReport, Report
from diffdeploy.verify.sweep import golden_cases

__all__ = ["golden_arrays", "golden_check", "verify_golden"]

# Of the largest number in fp64: other machines sum in other orders, which makes 1e-14 in random blocks; what is told
# from it is an output of other weights, and budgets begin at 1e-7.
_RELATIVE_ERROR = 1e-10


def golden_arrays(config: AnyModel, spec: GraphSpec, weights: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Inputs and exact outputs of `golden_cases`, named ``CASE.NAME``."""
    arrays: dict[str, Array] = {}
    for case in golden_cases(spec, seed):
        inputs = case.inputs(spec)
        arrays |= {f"{case.id}.{name}": array for name, array in inputs.items()}
        arrays |= {f"{case.id}.{name}": array for name, array in exact_outputs(config, weights, inputs, spec).items()}
    return arrays


def golden_check(bundle: Bundle, exact_weights: Mapping[str, Array]) -> Check:
    """The stored exact outputs must be what the formula gives here and now."""
    manifest = bundle.manifest
    stored = read_safetensors(bundle.path / GOLDEN)
    fresh = golden_arrays(manifest.config, manifest.graph, exact_weights, manifest.options.seed)
    problems = [] if stored.keys() == fresh.keys() else [f"it holds {sorted(stored)}, expected {sorted(fresh)}"]
    for name in stored.keys() & fresh.keys():
        scale = float(np.abs(fresh[name]).max(initial=0.0))
        if stored[name].shape != fresh[name].shape or not np.allclose(
            stored[name], fresh[name], rtol=0.0, atol=_RELATIVE_ERROR * scale
        ):
            problems.append(f"{name} is not what the formula gives")
    return Check(name="golden", passed=not problems, detail="; ".join(problems) or "stored outputs are the formula's")


def verify_golden(path: str | Path, run_options: RunOptions | None = None) -> Report:
    """Run the golden inputs through the runtime, in this process, and hold the outputs against the stored exact ones.

    Needs numpy and the backend of the format alone: eager's error, which sets the budget, is that of the report which
    accepted the bundle.

    Args:
        path: the bundle's directory.
        run_options: device and backend that the artifact is run with, and the key that must have signed it.

    Raises:
        InputError: no bundle there, or one that was never verified.
        IntegrityError: the bundle is not what was exported, its report is of other cases, or the key did not sign it.
        UnavailableError: this machine cannot run the format.
        ExportError: the backend cannot load the artifact.
    """
    run_options = run_options or RunOptions()
    bundle = open_bundle(path, run_options.public_key)
    accepted = _accepting_report(bundle)
    stored = read_safetensors(bundle.path / GOLDEN)
    with load(path, **asdict(run_options)) as runtime:
        cases = [
            _run_case(runtime, case, stored, accepted) for case in golden_cases(bundle.manifest.graph, accepted.seed)
        ]
        backend = runtime.description
    return accepted.model_copy(
        update={
            "backend": backend,
            "selection": "golden",
            "budget": BUDGETS[accepted.dtype],
            "environment": Environment.current(distributions()),
            # All that was looked at here: contracts take the libraries of an export.
            "contract": [Check(name="digests", passed=True, detail="every file is the one that was exported")],
            "cases": cases,
            "coverage": covered(bundle.manifest.graph, golden_cases(bundle.manifest.graph, accepted.seed)),
        }
    )


def _accepting_report(bundle: Bundle) -> Report:
    if REPORT not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path} was exported without verification, so no error of the eager block is on record for its "
            "budget; run diffdeploy verify without --golden"
        )
    return Report.from_bytes((bundle.path / REPORT).read_bytes(), str(bundle.path / REPORT))


def _run_case(runtime: Runtime, case: Case, stored: Mapping[str, Array], accepted: Report) -> CaseReport:
    spec = runtime.spec
    try:
        outputs = runtime(**{name: stored[f"{case.id}.{name}"] for name in spec.inputs})
    except Exception as error:  # noqa: BLE001 - whatever a backend raises is the finding
        return CaseReport.did_not_run(case.id, case.group, f"{type(error).__name__}: {error}")
    recorded = next((report for report in accepted.cases if report.id == case.id), None)
    if recorded is None:
        raise IntegrityError(f"{REPORT} in {runtime.bundle.path} has no case {case.id}, whose inputs the bundle holds")
    reports = []
    for eager in recorded.outputs:
        yardstick = Yardstick(stored[f"{case.id}.{eager.output}"], spec.dtype)
        yardstick.recall(eager)
        reports.append(measure(eager.output, outputs[eager.output], yardstick))
    return CaseReport.of(case.id, case.group, reports)
