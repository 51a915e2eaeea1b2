"""Verifying a bundle: the exact formula, the eager block and the artifact on every case; contract and properties."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, Bundle, Environment, eager_block, open_bundle
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.runtime import RunOptions, require_runnable
from diffdeploy.verify import contracts
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.eager import eager_error
from diffdeploy.verify.feeding import feed
from diffdeploy.verify.golden import golden_check
from diffdeploy.verify.metrics import BUDGETS, measure
from diffdeploy.verify.oracle import exact_and_stored
from diffdeploy.verify.properties import property_checks
from diffdeploy.verify.report import CaseReport, Check, Report, files_judged
from diffdeploy.verify.sweep import Selection, select_cases
from diffdeploy.verify.user_inputs import read_inputs, write_inputs
from diffdeploy.verify.worker import ArtifactProcess

if TYPE_CHECKING:
    from diffdeploy.modules import AttentionBlock

__all__ = ["Progress", "half_the_threads", "run_case", "verify_bundle"]

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
) -> Report:
    """Verify a bundle from its own files.

    Three computations per case are compared: the formula in fp64 from ``weights.safetensors``, the eager block with
    ``impl="naive"`` in the artifact's dtype, and the artifact, run by the public runtime in a process of its own.

    Args:
        path: the bundle's directory.
        seed: of the inputs; by default the one the bundle was made with.
        cases: see `select_cases`; by default ``full``, or none beside ``load_inputs``.
        load_inputs: file with inputs to verify on, see `read_inputs`.
        save_inputs: file that the inputs of all cases are written to before they run.
        progress: called with cases done, cases in all, and the name of the next one.
        run_options: device and backend that the artifact is run with.

    Raises:
        InputError: no bundle there, or inputs that its graph does not accept.
        IntegrityError: the bundle is not what was exported.
        UnavailableError: this machine cannot run the format.
    """
    run_options = run_options or RunOptions()
    bundle = open_bundle(path)
    manifest, spec = bundle.manifest, bundle.manifest.graph
    require_runnable(manifest, run_options)
    seed = int(manifest.options["seed"]) if seed is None else seed
    chosen, selection = _choose(bundle, seed, cases, load_inputs)
    if save_inputs is not None:
        write_inputs(save_inputs, chosen, spec)
    with ArtifactProcess(bundle.path, run_options) as artifact, half_the_threads():
        weights = read_safetensors(bundle.path / WEIGHTS)
        checks = contracts.checks(bundle, weights)
        exact_weights = {name: array.astype(np.float64) for name, array in weights.items()}
        checks.append(golden_check(bundle, exact_weights))
        eager = eager_block(bundle, impl="naive")
        reports = []
        try:
            backend = artifact.backend
        except ExportError as error:
            backend = "none"
            checks.append(Check(name="loads", passed=False, detail=str(error)))
        else:
            for done, case in enumerate(chosen):
                if progress is not None:
                    progress(done, len(chosen), case.id)
                reports.append(run_case(case, bundle, artifact, eager, exact_weights))
            checks += property_checks(artifact, manifest.config, spec, seed)
    return Report(
        format=manifest.format,
        dtype=spec.dtype,
        backend=backend,
        seed=seed,
        selection=selection,
        budget=BUDGETS[spec.dtype],
        files=files_judged(manifest),
        environment=Environment.current(),
        graph=contracts.facts(bundle),
        contract=checks,
        cases=reports,
    )


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Leave the other half to the artifact, which runs beside: threads without a core of their own only wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _choose(
    bundle: Bundle, seed: int, selection: Selection | None, load_inputs: Path | None
) -> tuple[list[AnyCase], str]:
    """The cases, and what to call their selection."""
    manifest = bundle.manifest
    users = [] if load_inputs is None else read_inputs(load_inputs, manifest.graph)
    if users and selection is None:
        return [*users], "user"
    selection = "full" if selection is None else selection
    swept = select_cases(selection, manifest.config, manifest.graph, seed)
    return [*users, *swept], f"user and {selection}" if users else str(selection)


def run_case(
    case: AnyCase,
    bundle: Bundle,
    artifact: ArtifactProcess,
    eager: "AttentionBlock",
    exact_weights: Mapping[str, Array],
) -> CaseReport:
    """One case: the exact result, eager's error, the artifact's outputs, and the verdict on them.

    Args:
        case: to run.
        bundle: an opened bundle.
        artifact: a process that has loaded it.
        eager: its block with ``impl="naive"``.
        exact_weights: its weights, float64.
    """
    spec = bundle.manifest.graph
    inputs = case.inputs(spec)
    if not case.chunks and not case.row_by_row:
        artifact.start(inputs)
    expected, stored = exact_and_stored(bundle.manifest.config, exact_weights, inputs, spec.dtype)
    yardsticks = eager_error(eager, inputs, expected, spec.dtype)
    yardsticks["output"].add_stored(stored)
    try:
        actual = feed(case, artifact, inputs)
    except DiffDeployError as error:
        return CaseReport.did_not_run(case.id, case.group, str(error))
    return CaseReport.of(case.id, case.group, [measure(name, actual[name], yardsticks[name]) for name in spec.outputs])
