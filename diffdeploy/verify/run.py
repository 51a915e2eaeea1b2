"""Verification of a bundle: its contract, its properties, and its outputs in every case.

In each case, the exact formula, the eager block and the artifact all compute the outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffdeploy.arrays import Array, ArrayView
from diffdeploy.budgets import BUDGETS
from diffdeploy.bundle import Bundle, Environment, open_bundle, read_tensors, read_weights
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import DiffDeployError, ExportError, InputError
from diffdeploy.formats import Check, RunOptions, Selection, distributions
from diffdeploy.locate import Finding, locate
from diffdeploy.processes import return_freed_memory
from diffdeploy.runtime import require_runnable, require_trusted
from diffdeploy.verify.artifact_checks import artifact_checks, artifact_facts
from diffdeploy.verify.capacity import capacity_check
from diffdeploy.verify.cases import AnyCase, Case
from diffdeploy.verify.coverage import Coverage, covered
from diffdeploy.verify.feeding import start
from diffdeploy.verify.float_twin import OpenArtifact, Subject, subjects_of
from diffdeploy.verify.golden import golden_check
from diffdeploy.verify.greedy import greedy_tokens
from diffdeploy.verify.layers import guilty_layer, layer_reports
from diffdeploy.verify.metrics import measure
from diffdeploy.verify.properties import property_checks
from diffdeploy.verify.reduction import smallest_failing
from diffdeploy.verify.report import CaseReport, OutputReport, Report, files_judged
from diffdeploy.verify.sweep import select_cases, telling_case
from diffdeploy.verify.threads import half_the_threads
from diffdeploy.verify.user_inputs import read_inputs, write_inputs
from diffdeploy.verify.worker import Artifact, ArtifactProcess
from diffdeploy.verify.yardsticks import Held, Yardsticks

if TYPE_CHECKING:
    from diffdeploy.modules import DiffTransformer

__all__ = ["Progress", "run_case", "verify_bundle"]

Progress = Callable[[int, int, str], None]


def verify_bundle(
    path: str | Path,
    *,
    seed: int | None = None,
    cases: Selection | None = None,
    load_inputs: Path | None = None,
    save_inputs: Path | None = None,
    progress: Progress | None = None,
    run_options: RunOptions | None = None,
    open_artifact: Callable[[Path, RunOptions], Artifact] = ArtifactProcess,
    yardsticks: Yardsticks | None = None,
    first_failure_only: bool = False,
) -> Report:
    """Verify a bundle from its own files.

    For each case, three computations are compared: the formula in fp64 from ``weights.safetensors``, the eager block
    with ``impl="naive"`` in the artifact's dtype, and the artifact, run by the public runtime in a separate process.

    Args:
        path: directory of the bundle.
        seed: random seed for the inputs; by default the one the bundle was made with.
        cases: see `select_cases`; ``full`` by default, or none if ``load_inputs`` is given.
        load_inputs: file with inputs to verify on, see `read_inputs`.
        save_inputs: file to which the inputs of all cases are written before they run.
        progress: callback that receives the number of cases done, the total number, and the name of the next step.
        run_options: device and backend that the artifact is run with, and the public key that the signature must match.
        open_artifact: function that opens the artifact to run it; by default in a separate process.
        yardsticks: yardsticks for the artifact, if they are already known.
        first_failure_only: true to stop at the first case that fails.

    Raises:
        InputError: there is no bundle, its cache separates the key streams, or its graph does not accept the inputs.
        IntegrityError: the bundle is not what was exported or signed, or it runs code and is not trusted.
        UnavailableError: this machine cannot run the format.
    """
    run_options = run_options or RunOptions()
    bundle = open_bundle(path, run_options.public_key)
    manifest, spec = bundle.manifest, bundle.manifest.graph
    _require_paired_cache(bundle)
    require_runnable(manifest, run_options)
    require_trusted(bundle, run_options)
    seed = manifest.options.seed if seed is None else seed
    chosen, selection = _choose(bundle, seed, cases, load_inputs)
    if save_inputs is not None:
        write_inputs(save_inputs, chosen, spec)
    # The artifact of a model takes only a small fraction of the time that the formula takes, so the formula keeps all
    # threads.
    sharing = nullcontext() if isinstance(manifest.config, DecoderConfig) else half_the_threads()
    # Opened first: its process loads the artifact while this process reads the contract.
    with open_artifact(bundle.path, run_options) as artifact, sharing:
        say = progress or (lambda *_: None)
        # Nobody signed what is opened besides the bundle: copies of it that the verification makes.
        own_options = replace(run_options, public_key=None, trust=True)
        found = _examine(
            bundle,
            artifact,
            lambda copy: open_artifact(copy, own_options),
            chosen,
            yardsticks,
            seed,
            say,
            first_failure_only=first_failure_only,
        )
    return Report(
        format=manifest.format,
        dtype=spec.dtype,
        seed=seed,
        selection=selection,
        budget=BUDGETS[spec.dtype],
        files=files_judged(manifest),
        environment=Environment.current(distributions()),
        graph=artifact_facts(bundle),
        **found._asdict(),
    )


class _Findings(NamedTuple):
    """The part of a report about the artifact itself; see `Report`."""

    backend: str
    contract: list[Check]
    cases: list[CaseReport]
    coverage: list[Coverage]
    greedy_tokens_checked: int | None
    guilty: Finding | None


def _examine(
    bundle: Bundle,
    artifact: Artifact,
    open_artifact: OpenArtifact,
    chosen: Sequence[AnyCase],
    yardsticks: Yardsticks | None,
    seed: int,
    progress: Progress,
    *,
    first_failure_only: bool,
) -> _Findings:
    """Examine contract, cases and properties, and locate the guilty stage of a failure."""
    weights: Mapping[str, Array]
    exact_weights: Mapping[str, Array]
    if isinstance(bundle.manifest.config, DecoderConfig):
        # The weights of a model take gigabytes: they stay on disk, and are widened one layer at a time.
        exact_weights = weights = ArrayView(read_tensors(bundle))
    else:
        weights = read_weights(bundle)
        exact_weights = {name: array.astype(np.float64) for name, array in weights.items()}
    checks = artifact_checks(bundle, weights)
    checks.append(golden_check(bundle, exact_weights))
    yardsticks = yardsticks or Yardsticks(bundle, exact_weights)
    reports: list[CaseReport] = []
    try:
        backend = artifact.backend
    except ExportError as error:
        checks.append(Check(name="loads", passed=False, detail=str(error)))
        return _Findings("none", checks, reports, covered(bundle.manifest.graph, []), None, None)
    total, spec, num_checked = len(chosen), bundle.manifest.graph, None
    with subjects_of(bundle, artifact, yardsticks, seed, open_artifact) as (subjects, of_activations):
        checks += of_activations
        for done, case in enumerate(chosen):
            progress(done, total, case.id)
            reports += [each.case(run_case(case, each.bundle, each.artifact, each.yardsticks)) for each in subjects]
            if first_failure_only and not all(report.passed for report in reports):
                break
        else:  # a run that stopped has already failed, and needs no properties
            progress(total, total, "properties")
            checks += property_checks(artifact, bundle.manifest.config, spec, seed)
        tried = covered(spec, chosen[: len(reports) // len(subjects)])
        if yardsticks.model is not None:
            progress(total, total, "each layer")
            reports += _of_layers(subjects, yardsticks.model, weights, seed)
            if not first_failure_only or all(report.passed for report in reports):
                progress(total, total, "greedy tokens")
                greedy = [greedy_tokens(each.artifact, each.yardsticks, spec, seed) for each in subjects]
                checks += [each.check(tokens.check) for each, tokens in zip(subjects, greedy, strict=True)]
                checks.append(capacity_check(artifact, spec, seed))
                num_checked = greedy[0].num_checked
    guilty = _guilty_stage(bundle, artifact, checks, chosen, reports, yardsticks)
    return _Findings(backend, checks, reports, tried, num_checked, guilty)


def _of_layers(
    subjects: Sequence[Subject], model: "DiffTransformer", weights: Mapping[str, Array], seed: int
) -> Iterator[CaseReport]:
    for each in subjects:
        yield from map(each.case, layer_reports(each.bundle, model, weights, seed, each.quantisation))


def _require_paired_cache(bundle: Bundle) -> None:
    """Reject a graph that separates the key streams, as graphs from earlier versions do.

    The graph runs, but the formula for the comparison takes and returns the streams side by side.
    """
    config, inputs = bundle.manifest.config.attention, bundle.manifest.graph.inputs
    if "past_key_values.key" not in inputs:
        return
    given, wanted = inputs["past_key_values.key"].shape[1::2], (config.num_kv_heads, config.key_cache_dim)
    if given != wanted:
        raise InputError(
            f"{bundle.path} was made by an earlier version with a cache of separate key streams, "
            f"{given[0]} heads of width {given[1]}, but verification needs {wanted[0]} of {wanted[1]}; export it again"
        )


def _guilty_stage(
    bundle: Bundle,
    artifact: Artifact,
    checks: list[Check],
    cases: Sequence[AnyCase],
    reports: list[CaseReport],
    yardsticks: Yardsticks,
) -> Finding | None:
    """Locate the fault, if there is one: the stage of a block, or the layer of a model."""
    if isinstance(bundle.manifest.config, DecoderConfig):
        return guilty_layer(reports, checks)
    failed = {report.id for report in reports if not report.passed}
    if not failed and all(check.passed for check in checks):
        return None
    spec = bundle.manifest.graph
    # Only cases of one call, since the joined results of several calls have no stages.
    single = [case for case in cases if case.id in failed and case.one_call]
    # The smallest case, since locating keeps all of its stages in fp64 in memory.
    smallest = min(single, key=lambda case: sum(case.sizes), default=None)
    if isinstance(smallest, Case):
        # A sweep that stops at the first failure has not tried smaller cases.
        smallest = smallest_failing(smallest, lambda case: not run_case(case, bundle, artifact, yardsticks).passed)
    telling = telling_case(spec, bundle.manifest.options.seed)
    chosen = [telling, *([] if smallest is None else [smallest])] if failed else []
    return locate(bundle, artifact, checks, [case.inputs(spec) for case in chosen])


def _choose(
    bundle: Bundle, seed: int, selection: Selection | None, load_inputs: Path | None
) -> tuple[list[AnyCase], str]:
    """Choose the cases, and the name of their selection."""
    manifest = bundle.manifest
    users = [] if load_inputs is None else read_inputs(load_inputs, manifest.graph)
    # Users who provide inputs want a verdict on those only; a sweep must be requested explicitly.
    if users and selection is None:
        return [*users], "user"
    selection = "full" if selection is None else selection
    swept = select_cases(selection, manifest.config, manifest.graph, seed)
    return [*users, *swept], f"user and {selection}" if users else str(selection)


def run_case(case: AnyCase, bundle: Bundle, artifact: Artifact, yardsticks: Yardsticks) -> CaseReport:
    """Verify one case: the exact result, eager's error, the artifact's outputs, and the verdict on them.

    Args:
        case: case to run.
        bundle: an opened bundle.
        artifact: object that runs the artifact.
        yardsticks: yardsticks for the artifact.
    """
    spec = bundle.manifest.graph
    inputs = case.inputs(spec)
    outputs = start(case, artifact, inputs, spec)
    expected = None
    if isinstance(bundle.manifest.config, DecoderConfig):
        # The artifact of a model needs little of the time, but as much memory as the yardsticks, so these are computed
        # when it has answered. Until then, not even the inputs are kept, whose caches are large.
        inputs = {}
        return_freed_memory()
    else:
        expected = yardsticks.of(case, inputs)
    try:
        actual = dict(outputs())  # an output is removed once it is judged
    except DiffDeployError as error:
        return CaseReport.did_not_run(case.id, case.group, str(error))
    if expected is None:
        inputs = case.inputs(spec)
        expected = yardsticks.of(case, inputs)
    queries = case.queries()
    # No positions are selected from an output of another shape, which fails because of its shape.
    if queries is not None and actual["output"].shape == inputs[spec.main_input].shape:
        actual = {**actual, "output": actual["output"][:, queries]}
    judged = {name: _judged(name, case, actual.pop(name), held) for name, held in expected}
    reports = [judged[name] for name in spec.outputs]
    if not all(np.isfinite(array.astype(np.float64)).all() for array in inputs.values()):
        # Elements that a hidden NaN affects do not count as untried.
        reports = [report.model_copy(update={"num_unjudged": 0}) for report in reports]
    return CaseReport.of(case.id, case.group, reports)


def _judged(name: str, case: AnyCase, actual: Array, held: Sequence[Held]) -> OutputReport:
    """Judge one output of a case, or its worst row."""
    if len(actual) != sum(len(part.rows) for part in held):
        held = held[:1]  # the shape differs, which the report will say
    reports = []
    for part in held:
        rows = actual if len(held) == 1 else actual[part.rows]
        report = measure(name, rows, part.yardstick, is_extreme=case.is_extreme)
        if report.worst_index is not None:
            place = [int(part.rows[report.worst_index[0]]), *report.worst_index[1:]]
            report = report.model_copy(update={"worst_index": place})
        reports.append(report)
    return max(reports, key=lambda report: report.severity)
