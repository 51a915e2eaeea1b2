"""``diffdeploy verify``: repeats all or part of the verification that accepted a bundle, from the bundle alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from diffdeploy.cli.completion import complete_engine
from diffdeploy.cli.progress import activity
from diffdeploy.cli.report_files import ReportFiles
from diffdeploy.cli.report_output import finish
from diffdeploy.cli.shared_options import (
    AsJson,
    Device,
    PublicKey,
    Recompile,
    RuntimeName,
    Trust,
    refuse_together,
    selection_of,
    takes_quiet,
)
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from diffdeploy.formats import RunOptions, Selection
    from diffdeploy.formats import RuntimeName as Name
    from diffdeploy.verify import Check, Report

__all__ = ["verify"]


@takes_quiet
def verify(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Directory that diffdeploy export made; with --engine, a model.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine: genai or vllm for models; openvino or reference for ONNX, as with --runtime.",
            autocompletion=complete_engine,
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks that share each layer, with --engine.", show_default="1")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Prove that the weights are still those of this checkpoint.")
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help="Verification inputs: quick, full or a number of cases, quick ones first.",
            show_default="full; none with --load-inputs",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed for the verification inputs.", show_default="that of the export")
    ] = None,
    load_inputs: Annotated[
        Path | None, typer.Option(help="Verify on these inputs: .safetensors or .npz with the graph's input names.")
    ] = None,
    save_inputs: Annotated[
        Path | None, typer.Option(help="Write the inputs of all cases: .safetensors or .npz.")
    ] = None,
    golden: Annotated[
        bool, typer.Option("--golden", help="Run only the stored inputs, with numpy and the format's runtime.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Put faults into copies of the bundle, and check that each is caught."),
    ] = False,
    from_report: Annotated[
        Path | None, typer.Option(help="Judge the figures of this report again, without running anything.")
    ] = None,
    k: Annotated[
        float | None,
        typer.Option(
            "--k", min=0.0, help="Allowed multiple of the error of a correct computation, with --from-report."
        ),
    ] = None,
    save_report: Annotated[Path | None, typer.Option(help="Write the report, for --from-report and diff.")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write a JUnit XML file, with a test case for each check and case.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one HTML page, with figures and without scripts.")
    ] = None,
    device: Device = None,
    runtime: RuntimeName = "native",
    recompile: Recompile = False,
    trust: Trust = False,
    public_key: PublicKey = None,
    warn_only: Annotated[bool, typer.Option("--warn-only", help="Exit with 0 even if verification fails.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check a bundle's digests, structure, properties and numbers, on this machine.

    The exact result is computed in fp64 from the weights in the bundle; the checkpoint is not needed.

    With --checkpoint, the checkpoint is read again with the options of the export, and must have the same weights, bit
    for bit.

    With --public-key, the signature is checked first, before anything in the bundle is used.

    With --engine genai or vllm, the engine continues prompts, and its log-probabilities and tokens are compared with
    the exact ones. With openvino or reference, the bundle is verified as usual, but in that runtime.

    With --self-test, the verification itself is tested: it must reject every faulty copy of the bundle.
    """
    runtime = _runtime_of(engine, runtime)
    files = ReportFiles(save_report=save_report, junit=junit, html=html)
    sweep = {"--cases": cases, "--seed": seed, "--load-inputs": load_inputs, "--save-inputs": save_inputs}
    sweep |= {"--checkpoint": checkpoint}
    saved = {"--save-report": save_report, "--html": html}
    alone = {"--golden": golden or None, "--self-test": self_test or None}
    # `or None`, since an option that has its default value counts as not given.
    run = {
        "--device": device,
        "--runtime": None if runtime == "native" else runtime,
        "--recompile": recompile or None,
        "--trust": trust or None,
        "--public-key": public_key,
    }
    if engine is not None and engine != runtime:
        others = {**sweep, **run, **alone, **saved, "--seed": None, "--from-report": from_report, "--k": k}
        refuse_together("--engine", "has inputs of its own", others)
        from diffdeploy.cli.verify_engine import run_engine

        return run_engine(bundle, engine, tensor_parallel_size, seed, files, as_json=as_json, warn_only=warn_only)
    refuse_together("verify without --engine", "has no ranks", {"--tensor-parallel-size": tensor_parallel_size})
    if from_report is not None:
        refuse_together("--from-report", "runs nothing", {**sweep, **run, **alone})
        files.check()
        report = _judged_again(from_report, bundle, k)
        return _end(report, bundle or from_report, files, as_json=as_json, warn_only=warn_only)
    refuse_together("verify without --from-report", "uses the k of the dtype", {"--k": k})
    if bundle is None:
        raise InputError("no bundle was given; give a directory that diffdeploy exported, or --from-report")
    from diffdeploy.formats import RunOptions

    run_options = RunOptions(device=device, runtime=runtime, recompile=recompile, trust=trust, public_key=public_key)
    if self_test:
        others = {"--golden": golden or None, "--warn-only": warn_only or None}
        refuse_together("--self-test", "verifies copies with faults in them", {**sweep, **others, **saved})
        from diffdeploy.cli.selftest import run_self_test

        return run_self_test(bundle, run_options, files, as_json=as_json)
    if golden:
        refuse_together("--golden", "runs the stored inputs alone", sweep)
    inputs = _Inputs(selection_of(cases), seed, load_inputs, save_inputs)
    files.check()
    report = _verified(bundle, None if golden else inputs, run_options, checkpoint)
    return _end(report, bundle, files, as_json=as_json, warn_only=warn_only)


class _Inputs(NamedTuple):
    """Inputs on which a bundle is verified; see `verify_bundle`."""

    cases: "Selection | None"
    seed: int | None
    load: Path | None
    save: Path | None


def _verified(bundle: Path, inputs: _Inputs | None, options: "RunOptions", checkpoint: Path | None) -> "Report":
    """Verify a bundle and return its report; without ``inputs``, use those stored in the bundle."""
    checks = []
    with activity("verifying" if checkpoint is None else "comparing with the checkpoint") as doing:
        from diffdeploy.bundle import open_bundle
        from diffdeploy.verify import verify_bundle, verify_golden

        if options.public_key is not None:
            # The signature comes first, since the checkpoint is read with options that the bundle contains.
            open_bundle(bundle, options.public_key)
            checks.append(_signature(options.public_key))
        if checkpoint is not None:
            # Compared before the sweep, which takes minutes that would be lost if the checkpoint could not be read.
            checks.append(_origin(bundle, checkpoint))
        doing.phase("verifying")
        if inputs is None:
            report = verify_golden(bundle, options)
        else:
            report = verify_bundle(
                bundle,
                seed=inputs.seed,
                cases=inputs.cases,
                load_inputs=inputs.load,
                save_inputs=inputs.save,
                progress=doing.progress,
                run_options=options,
            )
    for check in checks:
        report = report.with_check(check)
    return report


def _runtime_of(engine: str | None, runtime: "Name") -> "Name":
    """Runtime of the artifact; the engines openvino and reference are runtimes, and run the same sweep as native."""
    if engine not in ("openvino", "reference"):
        return runtime
    refuse_together(
        f"--engine {engine}", "is a runtime itself", {"--runtime": None if runtime == "native" else runtime}
    )
    return "openvino" if engine == "openvino" else "reference"


def _end(report: "Report", subject: Path, files: ReportFiles, *, as_json: bool, warn_only: bool) -> int:
    # Files are written first, since a closed pipe ends the command at the first printed line.
    files.write(report, subject)
    return finish(report, subject, as_json=as_json, warn_only=warn_only)


def _signature(public_key: str | Path) -> "Check":
    """Check that passes for every bundle that was opened with a key."""
    from diffdeploy.verify import Check

    return Check(name="signature", passed=True, detail=f"every file is signed by the key {public_key}")


def _origin(bundle: Path, checkpoint: Path) -> "Check":
    from diffdeploy.verify.checkpoint_match import matches_checkpoint

    return matches_checkpoint(bundle, checkpoint)


def _judged_again(path: Path, bundle: Path | None, k: float | None) -> "Report":
    from diffdeploy.bundle import open_bundle
    from diffdeploy.verify import read_report, rejudge

    report = read_report(path)
    if bundle is not None:
        # Figures of another bundle say nothing about this one.
        report.require_of(open_bundle(bundle), path)
    return rejudge(report, report.budget if k is None else report.budget.model_copy(update={"k": k}))
