"""``diffdeploy bench``: speed and memory of implementations and formats, side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer

from diffdeploy.cli import console
from diffdeploy.cli.bench_models import bench_models, refuse_options_of_blocks
from diffdeploy.cli.bench_view import json_fields, print_bench, print_changes
from diffdeploy.cli.checkpoint_options import takes_checkpoint_options
from diffdeploy.cli.completion import complete_formats, complete_impls, complete_layer
from diffdeploy.cli.progress import Activity, activity
from diffdeploy.cli.shared_options import AsJson, PublicKey, Trust, takes_quiet
from diffdeploy.errors import DiffDeployError, InputError, VerificationError

if TYPE_CHECKING:
    from diffdeploy.bench import Bench, BenchReport
    from diffdeploy.bench.models import ModelBench, ModelReport

__all__ = ["bench"]


@takes_quiet
@takes_checkpoint_options
def bench(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A checkpoint, and bundles of the same block or model.",
            metavar="CHECKPOINT|BUNDLE",
            show_default=False,
        ),
    ] = None,
    impl: Annotated[
        str,
        typer.Option(
            help="Eager implementations, softmax and softmax-compiled: comma-separated names, all or none.",
            autocompletion=complete_impls,
        ),
    ] = "all",
    format_names: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Formats to export for the run: comma-separated names, all or none.",
            show_default="all; none when a bundle is given",
            autocompletion=complete_formats,
        ),
    ] = None,
    seq: Annotated[
        str | None,
        typer.Option(
            help="Sequence lengths, comma-separated; with --graph cached, cache lengths before one new token.",
            show_default="128,512,2048; 128,512,2048,8192,32768 with --graph cached",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    embed_dim: Annotated[
        int | None, typer.Option(min=1, help="Model width of a random block.", show_default="1024")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Differential heads of a random block.", show_default="8")
    ] = None,
    num_kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads of a random block.", show_default="same as --num-heads")
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Stream width of a random block.", show_default="--embed-dim / --num-heads / 2"),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="Dtype of weights and inputs: float32, float16 or bfloat16.",
            metavar="DTYPE",
            show_default="float32, or that of the bundle",
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device that everything runs on.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads of every candidate.", show_default="torch's choice")
    ] = None,
    graph: Annotated[
        Literal["plain", "masked", "cached"] | None,
        typer.Option(
            help="Graph: hidden states alone, with a padding mask, or one token with a key/value cache.",
            show_default="plain, or that of the bundle",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Candidate that the ratios refer to.", show_default="naive, or the first one")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds per size.", show_default="as many as fit in 12 s, 9 to 31")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="0-based layer of the checkpoint.", show_default="the only one", autocompletion=complete_layer
        ),
    ] = None,
    *,
    reading: dict[str, Any],
    trust: Trust = False,
    public_key: PublicKey = None,
    as_json: AsJson = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the figures to this CSV file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also plot latency against length to this .svg or .png file.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Report what changed since the run that --save wrote to this file.")
    ] = None,
) -> int:
    """Measure implementations, formats and plain softmax attention in one run, each verified before it is timed.

    Without a CHECKPOINT or BUNDLE, it measures a block with random weights.

    For bundles of whole models, it measures prefill and decode at the lengths of --seq, compared with the eager model
    and, given a DiffLlama checkpoint, with transformers.

    All candidates take turns, round by round; memory is measured in a separate process for each.
    """
    outputs = Outputs(as_json=as_json, csv=csv, plot=plot, save=save, compare=compare)
    outputs.check()
    with activity("loading torch", stages=False):
        from diffdeploy.bench.models import ModelBenchRequest, holds_models
        from diffdeploy.bench.request import BenchRequest, prepare
        from diffdeploy.checkpoints import CheckpointOptions

    shared = _Shared(
        sources=tuple(sources or ()),
        impl=_names(impl),
        seq=None if seq is None else _numbers("--seq", seq),
        batch=_numbers("--batch", batch),
        device=device,
        threads=threads,
        baseline=baseline,
        rounds=rounds,
        trust=True if trust else None,
        public_key=public_key,
    )
    if holds_models(shared["sources"]):
        of_blocks = {
            "--format": None if format_names == "none" else format_names,
            "--embed-dim": embed_dim,
            "--num-heads": num_heads,
            "--num-kv-heads": num_kv_heads,
            "--head-dim": head_dim,
            "--dtype": dtype,
            "--graph": graph,
            "--layer": layer,
            "--plot": plot,
            **{f"--{name.replace('_', '-')}": value for name, value in reading.items()},
        }
        refuse_options_of_blocks(of_blocks)
        return _exit_code(*bench_models(ModelBenchRequest(**shared), outputs, _measure))
    request = BenchRequest(
        **shared,
        format=None if format_names is None else _names(format_names),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        graph=graph,
        reading=CheckpointOptions(layer=layer, **reading),
    )
    # Read before bundles are exported and measured, since both take minutes.
    old = outputs.earlier()
    with activity("preparing") as doing, prepare(request, doing.phase, console.note, compare_with=old) as run:
        failure = _measure(run, doing)
        report = run.report()
    if report is None:
        # Nothing was measured, so there is no result to print before the error.
        raise failure if isinstance(failure, DiffDeployError) else KeyboardInterrupt("nothing was measured")
    outputs.write(report, old)
    return _exit_code(report, failure)


class _Shared(TypedDict):
    """Options that define a measurement of a block or of a model."""

    sources: tuple[Path, ...]
    impl: list[str]
    seq: list[int] | None
    batch: list[int]
    device: Literal["cpu", "cuda"]
    threads: int | None
    baseline: str | None
    rounds: int | None
    trust: Literal[True] | None
    public_key: Path | None


def _exit_code(report: "BenchReport | ModelReport", failure: KeyboardInterrupt | DiffDeployError | None) -> int:
    """Print what went wrong below the result, and return the exit code."""
    if isinstance(failure, KeyboardInterrupt):
        console.fail("interrupted; the measurements made so far are above")
        raise console.Ended(console.INTERRUPTED)
    if failure is not None:
        console.fail(str(failure))
        raise console.Ended(failure.exit_code)
    # Not an exception, since the run itself succeeded, and the correct results have been printed.
    wrong = [row for row in report.results if row.status == "wrong"]
    if wrong:
        first = wrong[0]
        console.fail(f"{first.name} is wrong at {first.size.id}: {first.reason}")
    return VerificationError.exit_code if wrong else 0


def _numbers(option: str, text: str) -> list[int]:
    """Parse comma-separated positive integers.

    Raises:
        InputError: the text is anything else.
    """
    parts = _names(text)
    # Not isdigit, which accepts superscripts that int() refuses.
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} is {text!r}; accepted: comma-separated positive integers")
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    """Parse comma-separated names."""
    return [part.strip() for part in text.split(",")]


def _measure(run: "Bench | ModelBench", doing: Activity) -> KeyboardInterrupt | DiffDeployError | None:
    """Run to the end or to a failure, which is returned, so that earlier measurements are not lost."""

    def progress(text: str, seconds_left: float | None) -> None:
        # In a text such as `B1-S128: round 3 of 15`, the size is the stage.
        stage, _, step = text.partition(": ")
        doing.phase(stage)
        doing.step(step, seconds_left)

    try:
        run.measure(progress)
    except (KeyboardInterrupt, DiffDeployError) as failure:
        return failure
    return None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Destinations of the result besides standard output, and the earlier run to compare it with."""

    as_json: bool
    csv: Path | None
    plot: Path | None
    save: Path | None
    compare: Path | None

    def check(self) -> None:
        """Check, before anything is measured, that all files can be written.

        Raises:
            InputError: a file cannot be written, or the suffix of the plot is not accepted.
            UnavailableError: matplotlib is not installed.
        """
        from diffdeploy.files import check_writable

        for path in (self.csv, self.plot, self.save):
            if path is not None:
                check_writable(path)
        if self.plot is not None:
            from diffdeploy.bench.plot import require_plot

            require_plot(self.plot)

    def earlier(self) -> "BenchReport | None":
        """The report to compare with.

        Raises:
            InputError: the file cannot be read.
        """
        from diffdeploy.bench.results import read_report

        return None if self.compare is None else read_report(self.compare)

    def write(self, report: "BenchReport", old: "BenchReport | None") -> None:
        """Write and print everything, files first."""
        from diffdeploy.bench import changes_since

        if self.save is not None:
            # Files are written first, since a closed pipe ends the command at the first printed line.
            self.save.write_text(json.dumps(report.fields(), indent=2, allow_nan=False) + "\n")
        if self.csv is not None:
            self.csv.write_text(report.to_csv())
        # If all candidates are wrong, there is nothing to plot.
        if self.plot is not None and any(row.latency_ms is not None for row in report.results):
            from diffdeploy.bench.plot import plot

            plot(report, self.plot)
        changes = None if old is None else changes_since(old, report)
        if self.as_json:
            console.print_json(json_fields(report, changes))
            return
        print_bench(report)
        if changes is not None:
            print_changes(changes)
