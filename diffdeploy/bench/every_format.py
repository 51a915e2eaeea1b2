"""One block in every format that this machine supports: exported, started in a fresh process, and measured."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from diffdeploy.bench.block_source import BlockSource
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.bench.results import BenchReport
from diffdeploy.bench.run import Bench
from diffdeploy.bench.startup import Startup, measure_startup
from diffdeploy.bundle import cast_weights
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import DiffDeployError, InputError, VerificationError
from diffdeploy.exporters import Export, ExportOptions, export_bundle, settled_length
from diffdeploy.formats import Target, export_targets
from diffdeploy.ops import Impl
from diffdeploy.verify import Progress, RejectedError, Report

__all__ = ["EAGER", "FormatResult", "export_every_format", "measure_formats"]

# Implementation of the eager block for comparison: two calls, as in most code bases.
EAGER = Impl.TWO_CALL.value
_LENGTHS = (128, 1024)
# Odd, so that the median is a measured round; enough for a confidence interval.
_ROUNDS = 15

Say = Callable[[str], None]


@dataclass
class FormatResult:
    """The result for one format.

    Attributes:
        name: name of the target, see `diffdeploy.formats.export_targets`.
        path: path of its bundle, which may not exist.
        left_out: reason why it was not tried; ``None`` if it was.
        export: the finished export.
        failure: error of a failed export.
        startup: seconds until the first result, in a fresh process.
    """

    name: str
    path: Path
    left_out: str | None = None
    export: Export | None = None
    failure: DiffDeployError | None = None
    startup: Startup | None = field(default=None)

    @property
    def verdict(self) -> str:
        """``left out``, ``failed``, ``passed`` or ``unverified``."""
        if self.left_out is not None:
            return "left out"
        if self.export is None:
            return "failed"
        return "unverified" if self.export.report is None else "passed"

    @property
    def report(self) -> Report | None:
        """The report of the verification, if there was one."""
        if isinstance(self.failure, RejectedError):
            return self.failure.report
        return None if self.export is None else self.export.report

    @property
    def bundle(self) -> Path | None:
        """Path of the bundle, if there is one."""
        return None if self.export is None else self.path

    @property
    def why(self) -> str | None:
        """Reason why there is no bundle."""
        return self.left_out if self.failure is None else str(self.failure)

    @property
    def exit_code(self) -> int:
        """Exit code of this export alone."""
        if isinstance(self.failure, RejectedError):
            return VerificationError.exit_code
        # Also 0 for a format that was left out, since nobody requested it by name.
        return 0 if self.failure is None else self.failure.exit_code


def export_every_format(
    checkpoint: Checkpoint,
    parent: Path,
    options: ExportOptions,
    *,
    force: bool,
    verify: bool,
    phase: Say,
    progress: Progress,
    finished: Callable[[FormatResult], None],
) -> list[FormatResult]:
    """Export one block in every format, each to its own folder, and start those that passed.

    Args:
        checkpoint: the block.
        parent: folder of the bundles.
        options: options for the artifacts; options that only one format has apply only to that format.
        force: true to replace existing bundles.
        verify: true to verify each bundle.
        phase: callback that receives a few words when a phase begins.
        progress: see `export_bundle`.
        finished: called with each format as soon as its verdict is known.
    """
    results = []
    for name, target in export_targets().items():
        result = FormatResult(name, parent / name)
        results.append(result)
        own = _options_of(target, options)
        result.left_out = _why_left_out(target, own, verify=verify)
        if result.left_out is None:
            # Several formats have stages of the same name.
            own_phase = partial(_phase_of, name, phase)
            try:
                result.export = export_bundle(
                    checkpoint, result.path, own, force=force, verify=verify, phase=own_phase, progress=progress
                )
            except DiffDeployError as error:
                # Not every block and graph is possible in every flavor, and nobody requested this one by name.
                if isinstance(error, InputError) and target.name != target.format.name:
                    result.left_out = str(error)
                else:
                    result.failure = error
        finished(result)
    for result in results:
        if result.verdict == "passed":
            phase(f"starting {result.name} in a fresh process")
            result.startup = measure_startup(result.path, options.device)
    return results


def _phase_of(name: str, phase: Say, text: str) -> None:
    phase(f"{name}: {text}")


def _options_of(target: Target, options: ExportOptions) -> ExportOptions:
    """Options for a target; those specific to the requested format are omitted for the others."""
    if target.format.name == options.format:
        return options if target.name == options.format else replace(options, onnx_flavor=target.flavor)
    # The first flavor is the default, so it needs no --onnx-flavor, an option that some formats do not accept.
    others = target.format.flavors[1:]
    flavor = target.flavor if target.flavor in others else None
    return replace(options, format=target.format.name, opset=None, onnx_flavor=flavor, runtime="native")


def _why_left_out(target: Target, options: ExportOptions, *, verify: bool) -> str | None:
    device = target.format.device_of(options)
    reason = target.format.why_not_export(device, options.dtype)
    if reason is None and verify:
        reason = target.format.why_not_run(device, options.dtype, runtime=options.runtime)
    return reason


def measure_formats(
    checkpoint: Checkpoint, results: list[FormatResult], options: ExportOptions, source: str
) -> BenchReport | None:
    """Measure latencies at two lengths; the eager block and all bundles that passed take turns.

    Returns:
        The report; ``None`` if no bundle passed.
    """
    import torch
    from safetensors.torch import save_file

    # Latencies of failed or unverified bundles are not worth comparing.
    made = [result for result in results if result.verdict == "passed"]
    if not made:
        return None
    # In a cached graph, one position is used by the decoded token.
    length, _ = settled_length(options, checkpoint)
    longest = length - (options.graph == "cached")
    lengths = sorted({min(length, longest) for length in _LENGTHS})
    with tempfile.TemporaryDirectory(prefix="diffdeploy-") as folder:
        weights = Path(folder) / "weights.safetensors"
        save_file(cast_weights(checkpoint.weights, options.dtype), weights)
        plan = Plan(
            config=checkpoint.config,
            weights=weights,
            graph=options.graph,
            dtype=options.dtype,
            device=options.device or "cpu",
            threads=torch.get_num_threads(),
            sizes=tuple(Size.of_length(length, batch_size=1, graph=options.graph) for length in lengths),
            candidates=(
                Candidate.of_impl(EAGER),
                *(Candidate.of_bundle(f"{each.name} bundle", each.path) for each in made),
            ),
            baseline=EAGER,
            rounds=_ROUNDS,
        )
        bench = Bench(plan, BlockSource(checkpoint, (), source, ()).block, "diffdeploy export --format all")
        bench.measure(lambda _text, _seconds: None)
        return bench.report()
