"""Golden vectors: inputs with exact outputs in the bundle, for machines that have only its runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.budgets import BUDGETS
from diffdeploy.bundle import GOLDEN, REPORT, Bundle, Environment, Quantisation, open_bundle
from diffdeploy.config import AnyModel
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.formats import Check, RunOptions, distributions
from diffdeploy.graphs import GraphSpec
from diffdeploy.runtime import Runtime, load
from diffdeploy.verify.cases import Case
from diffdeploy.verify.coverage import covered
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.report import CaseReport, Report, files_judged
from diffdeploy.verify.sweep import golden_cases

__all__ = ["golden_arrays", "golden_check", "verify_golden"]

# Tolerance in fp64, relative to the largest number. Other machines sum in other orders, which causes errors of 1e-14 in
# random blocks. Outputs of other weights must still be detected, and budgets begin at 1e-7.
_RELATIVE_ERROR = 1e-10

# Maximum size of a main output that is stored completely. Only the last position of a larger one is stored, such as the
# logits of a large vocabulary.
_MOST_BYTES = 2**24

_WITHOUT_GOLDEN = "run diffdeploy verify without --golden"


def golden_arrays(
    config: AnyModel,
    spec: GraphSpec,
    weights: Mapping[str, Array],
    seed: int,
    quantisation: Quantisation | None = None,
) -> dict[str, Array]:
    """Inputs and exact outputs of `golden_cases` as ``CASE.NAME``; large main outputs have only the last position."""
    arrays: dict[str, Array] = {}
    for case in golden_cases(spec, seed):
        inputs = case.inputs(spec)
        outputs = exact_outputs(config, weights, inputs, spec, quantisation)
        if outputs[spec.main_output].nbytes > _MOST_BYTES:
            outputs[spec.main_output] = outputs[spec.main_output][:, -1:].copy()
        arrays |= {f"{case.id}.{name}": array for name, array in (*inputs.items(), *outputs.items())}
    return arrays


def golden_check(bundle: Bundle, exact_weights: Mapping[str, Array]) -> Check:
    """Check that the stored exact outputs are those that the formula gives now."""
    manifest = bundle.manifest
    stored = read_safetensors(bundle.path / GOLDEN)
    options = manifest.options
    fresh = golden_arrays(manifest.config, manifest.graph, exact_weights, options.seed, options.quantisation)
    problems = [] if stored.keys() == fresh.keys() else [f"it holds {sorted(stored)}, expected {sorted(fresh)}"]
    for name in stored.keys() & fresh.keys():
        scale = float(np.abs(fresh[name]).max(initial=0.0))
        if stored[name].shape != fresh[name].shape or not np.allclose(
            stored[name], fresh[name], rtol=0.0, atol=_RELATIVE_ERROR * scale
        ):
            problems.append(f"{name} differs from the result of the formula")
    return Check(name="golden", passed=not problems, detail="; ".join(problems) or "stored outputs match the formula")


def verify_golden(path: str | Path, run_options: RunOptions | None = None) -> Report:
    """Run the golden inputs through the runtime, in this process, and compare the outputs with the stored exact ones.

    This needs only numpy and the backend of the format: the report that accepted the bundle provides eager's error,
    which determines the budget.

    Args:
        path: directory of the bundle.
        run_options: device and backend that the artifact is run with, and the public key that the signature must match.

    Raises:
        InputError: there is no bundle, or it was never verified.
        IntegrityError: the bundle is not what was exported, its report belongs to another bundle or lacks a golden
            vector, or it was not signed with the key.
        UnavailableError: this machine cannot run the format.
        ExportError: the backend cannot load the artifact.
    """
    run_options = run_options or RunOptions()
    bundle = open_bundle(path, run_options.public_key)
    spec, accepted = bundle.manifest.graph, _accepting_report(bundle)
    cases = golden_cases(spec, accepted.seed)
    stored, recorded = _stored(bundle, cases), _recorded(bundle, cases, accepted)
    with load(path, **asdict(run_options)) as runtime:
        reports = [_run_case(runtime, case, stored, recorded[case.id]) for case in cases]
        backend = runtime.description
    return accepted.model_copy(
        update={
            "backend": backend,
            "selection": "golden",
            "budget": BUDGETS[accepted.dtype],
            "environment": Environment.current(distributions()),
            # The only structural check made here, since contracts need the libraries of an export.
            "contract": [Check(name="digests", passed=True, detail="every file is the one that was exported")],
            "cases": reports,
            "coverage": covered(spec, cases),
        }
    )


def _accepting_report(bundle: Bundle) -> Report:
    if REPORT not in bundle.manifest.files:
        raise InputError(
            f"{bundle.path} was exported without verification, so the error of the eager block, which determines the "
            f"budget, was not recorded; {_WITHOUT_GOLDEN}"
        )
    report = Report.from_bytes((bundle.path / REPORT).read_bytes(), str(bundle.path / REPORT))
    manifest = bundle.manifest
    if not report.passed:
        raise IntegrityError(f"{REPORT} in {bundle.path} did not accept the bundle; {_WITHOUT_GOLDEN}")
    if (report.format, report.dtype, report.files) != (manifest.format, manifest.graph.dtype, files_judged(manifest)):
        raise IntegrityError(f"{REPORT} in {bundle.path} belongs to another bundle; {_WITHOUT_GOLDEN}")
    return report


def _stored(bundle: Bundle, cases: Sequence[Case]) -> dict[str, Array]:
    """Read the golden vectors of every case.

    Raises:
        IntegrityError: a vector is missing.
    """
    stored, spec = read_safetensors(bundle.path / GOLDEN), bundle.manifest.graph
    wanted = [f"{case.id}.{name}" for case in cases for name in (*spec.inputs, *spec.outputs)]
    if missing := [name for name in wanted if name not in stored]:
        raise IntegrityError(f"{GOLDEN} in {bundle.path} lacks {', '.join(missing)}; {_WITHOUT_GOLDEN}")
    return stored


def _recorded(bundle: Bundle, cases: Sequence[Case], accepted: Report) -> dict[str, CaseReport]:
    """Results in a report for each case, which must include all outputs of the graph.

    Raises:
        IntegrityError: a case or an output is missing.
    """
    outputs = list(bundle.manifest.graph.outputs)
    recorded = {case.id: case for case in accepted.cases if [each.output for each in case.outputs] == outputs}
    if missing := [case.id for case in cases if case.id not in recorded]:
        raise IntegrityError(f"{REPORT} in {bundle.path} lacks {', '.join(missing)}; {_WITHOUT_GOLDEN}")
    return recorded


def _run_case(runtime: Runtime, case: Case, stored: Mapping[str, Array], recorded: CaseReport) -> CaseReport:
    spec = runtime.spec
    try:
        outputs = runtime(**{name: stored[f"{case.id}.{name}"] for name in spec.inputs})
    except Exception as error:  # noqa: BLE001 - any error that a backend raises is the finding
        return CaseReport.did_not_run(case.id, case.group, f"{type(error).__name__}: {error}")
    reports = []
    for eager in recorded.outputs:
        exact, output = stored[f"{case.id}.{eager.output}"], outputs[eager.output]
        if eager.output == spec.main_output:
            output = output[:, -exact.shape[1] :]
        yardstick = Yardstick(exact, spec.dtype)
        yardstick.recall(eager)
        reports.append(measure(eager.output, output, yardstick))
    return CaseReport.of(case.id, case.group, reports)
