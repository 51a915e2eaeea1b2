"""``diffdeploy verify``: everything that accepted a bundle, again, from the bundle alone; or a part of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.report_output import finish
from diffdeploy.cli.shared_options import AsJson, Device, PublicKey, Recompile, RuntimeName, Trust, selection_of
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffdeploy.formats import RuntimeName as Name
    from diffdeploy.verify import Check, Report

__all__ = ["verify"]


def verify(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Directory that diffdeploy export made; with --engine, a model.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="What runs it: genai or vllm for models; openvino or reference for ONNX, see --runtime."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share each layer, with --engine.", show_default="1")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Prove that the weights are still those of this checkpoint.")
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help="quick, full, or how many: quick ones first, random ones last.",
            show_default="full; none beside --load-inputs",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the inputs.", show_default="as the bundle was made")
    ] = None,
    load_inputs: Annotated[
        Path | None, typer.Option(help="Verify on these inputs: .safetensors or .npz with the graph's input names.")
    ] = None,
    save_inputs: Annotated[
        Path | None, typer.Option(help="Write the inputs of all cases: .safetensors or .npz.")
    ] = None,
    golden: Annotated[
        bool, typer.Option("--golden", help="Run the stored inputs alone, with numpy and the format's runtime.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Put faults into copies of the bundle, and see that each is caught."),
    ] = False,
    from_report: Annotated[
        Path | None, typer.Option(help="Judge the figures of this report again, without running anything.")
    ] = None,
    k: Annotated[
        float | None,
        typer.Option("--k", min=0.0, help="Factor on the error of a right computation, with --from-report."),
    ] = None,
    save_report: Annotated[Path | None, typer.Option(help="Write the report, for --from-report and diff.")] = None,
    device: Device = None,
    runtime: RuntimeName = "native",
    recompile: Recompile = False,
    trust: Trust = False,
    public_key: PublicKey = None,
    warn_only: Annotated[bool, typer.Option("--warn-only", help="Exit with 0 also when verification fails.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check a bundle's digests, structure, properties and numbers, on this machine.

    The exact result is computed in fp64 from the weights in the bundle; the checkpoint is not needed.

    With --checkpoint, its block is read again as for the export, and must give the same weights bit for bit.

    With --public-key, the signature is checked first, before anything in the bundle is used.

    With --engine genai or vllm, the engine continues prompts, and its log-probabilities and tokens are compared. With
    openvino or reference, everything is as without, but for what runs the artifact.

    With --self-test, the verification itself is tried: wrong copies of the bundle, each of which must be refused.
    """
    runtime = _runtime_of(engine, runtime)
    # Before the verification, which takes minutes.
    if save_report is not None and not save_report.parent.is_dir():
        raise InputError(f"{save_report} cannot be written: there is no folder {save_report.parent}")
    sweep = {"--cases": cases, "--seed": seed, "--load-inputs": load_inputs, "--save-inputs": save_inputs}
    sweep |= {"--checkpoint": checkpoint}
    saved, alone = {"--save-report": save_report}, {"--golden": golden or None, "--self-test": self_test or None}
    # `or None`, since what is at its default was not given.
    run = {
        "--device": device,
        "--runtime": None if runtime == "native" else runtime,
        "--recompile": recompile or None,
        "--trust": trust or None,
        "--public-key": public_key,
    }
    if engine is not None and engine != runtime:
        others = {**sweep, **run, **alone, **saved, "--seed": None, "--from-report": from_report, "--k": k}
        _refuse("--engine", "has inputs of its own", others)
        from diffdeploy.cli.verify_engine import run_engine

        return run_engine(bundle, engine, tensor_parallel_size, seed, as_json=as_json, warn_only=warn_only)
    _refuse("verify without --engine", "has no ranks", {"--tensor-parallel-size": tensor_parallel_size})
    if from_report is not None:
        _refuse("--from-report", "runs nothing", {**sweep, **run, **alone})
        report = _judged_again(from_report, bundle, k)
        return _end(report, bundle or from_report, save_report, as_json=as_json, warn_only=warn_only)
    _refuse("verify without --from-report", "judges by its own table", {"--k": k})
    if bundle is None:
        raise InputError("no bundle was given; give a directory that diffdeploy exported, or --from-report")
    from diffdeploy.formats import RunOptions

    run_options = RunOptions(device=device, runtime=runtime, recompile=recompile, trust=trust, public_key=public_key)
    if self_test:
        others = {"--golden": golden or None, "--warn-only": warn_only or None}
        _refuse("--self-test", "verifies copies with faults in them", {**sweep, **others, **saved})
        from diffdeploy.cli.selftest import run_self_test

        return run_self_test(bundle, run_options, as_json=as_json)
    with console.activity("opening the bundle") as activity:
        from diffdeploy.verify import verify_bundle, verify_golden

        if golden:
            _refuse("--golden", "runs the stored inputs alone", sweep)
            report = verify_golden(bundle, run_options)
        else:
            report = verify_bundle(
                bundle,
                seed=seed,
                cases=selection_of(cases),
                load_inputs=load_inputs,
                save_inputs=save_inputs,
                progress=activity.progress,
                run_options=run_options,
            )
        if public_key is not None:
            report = report.with_check(_signature(public_key))
        if checkpoint is not None:
            activity.phase("reading the checkpoint")
            report = report.with_check(_origin(bundle, checkpoint))
    return _end(report, bundle, save_report, as_json=as_json, warn_only=warn_only)


def _runtime_of(engine: str | None, runtime: "Name") -> "Name":
    """What runs the artifact: engines that are runtimes of artifacts run the same sweep as any other."""
    if engine not in ("openvino", "reference"):
        return runtime
    _refuse(f"--engine {engine}", "is a runtime itself", {"--runtime": None if runtime == "native" else runtime})
    return "openvino" if engine == "openvino" else "reference"


def _end(report: "Report", subject: Path, save_report: Path | None, *, as_json: bool, warn_only: bool) -> int:
    if save_report is not None:
        try:
            save_report.write_bytes(report.to_bytes())
        except OSError as error:
            raise InputError(f"{save_report} cannot be written ({error.strerror}); give another file") from error
    return finish(report, subject, as_json=as_json, warn_only=warn_only)


def _refuse(option: str, why: str, others: "Mapping[str, object]") -> None:
    if given := [name for name, value in others.items() if value is not None]:
        raise InputError(f"{option} {why}, so it does not go with {', '.join(given)}; leave one out")


def _signature(public_key: Path) -> "Check":
    """What is so of every bundle that was opened with a key."""
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
