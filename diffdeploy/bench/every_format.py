"""Every format that this machine can make of one block: exported, started in a fresh process, and measured."""

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

# The eager block that latencies are compared with: two calls, as most code bases compute it.
EAGER = Impl.TWO_CALL.value
_LENGTHS = (128, 1024)
# Odd, so that the median is a round that was measured; enough for a confidence interval.
_ROUNDS = 15

Say = Callable[[str], None]


@dataclass
class FormatResult:
    """What became of one format.

    Attributes:
        name: name of the target, see `diffdeploy.formats.export_targets`.
        path: where its bundle is, or would be.
        left_out: why it was not tried; ``None`` where it was.
        export: the finished export.
        failure: why there is none.
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
        """Where the bundle is, if there is one."""
        return None if self.export is None else self.path

    @property
    def why(self) -> str | None:
        """Why there is no bundle."""
        return self.left_out if self.failure is None else str(self.failure)

    @property
    def exit_code(self) -> int:
        """The exit code of this export alone."""
        if isinstance(self.failure, RejectedError):
            return VerificationError.exit_code
        # Of what was left out, too: nobody asked for it by name.
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
    """Export one block in every format, each to a folder of its own, and start those that passed.

    Args:
        checkpoint: the block.
        parent: folder of the bundles.
        options: what to make; options that only one format has stay with that format.
        force: replace bundles that are there.
        verify: verify each.
        phase: called with a few words when a phase begins.
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
                # Not every block and graph can be had in every flavor; nobody asked for this one by its name.
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
    """What a target is asked for: options that it does not have stay with the format that they were given for."""
    if target.format.name == options.format:
        return options if target.name == options.format else replace(options, onnx_flavor=target.flavor)
    # The first flavor is what a format writes without the option, and some formats have no such option.
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
    """Latencies at two lengths: the eager block and all bundles that passed, in turns; ``None`` where none did."""
    import torch
    from safetensors.torch import save_file

    # What failed, or was not verified, has no latency worth comparing.
    made = [result for result in results if result.verdict == "passed"]
    if not made:
        return None
    # A cached graph needs one position for the token that is decoded.
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
