"""``diffdeploy export``: from a checkpoint to a verified bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffdeploy.cli.all_formats import export_formats
from diffdeploy.cli.checkpoint_options import takes_checkpoint_options
from diffdeploy.cli.completion import complete_format, complete_layer
from diffdeploy.cli.export_job import Job, export_all
from diffdeploy.cli.progress import activity
from diffdeploy.cli.shared_options import AsJson, Cases, refuse_together, selection_of, takes_quiet
from diffdeploy.errors import InputError
from diffdeploy.formats import format_names

__all__ = ["export"]


_ALL = "all"


def _known_format(name: str) -> str:
    """Refuse an unknown format, before anything is loaded."""
    accepted = (*format_names(), _ALL)
    if name not in accepted:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, accepted))}.")
    return name


@takes_quiet
@takes_checkpoint_options
def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help=".safetensors or .pt file, or a directory with one.", show_default="the bundled sample"),
    ] = None,
    # Text and a callback, since formats come from the registry rather than from a Literal.
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"Deployment format: {', '.join(format_names())}; or {_ALL}, every one that this machine supports.",
            metavar="FORMAT",
            callback=_known_format,
            autocompletion=complete_format,
        ),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory of the bundle.", show_default="artifacts/NAME-layerN-FORMAT"),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="0-based layer to export as a block, or all.",
            show_default="the whole model, or the only block",
            autocompletion=complete_layer,
        ),
    ] = None,
    *,
    reading: dict[str, Any],
    graph: Annotated[
        Literal["plain", "masked", "cached"] | None,
        typer.Option(
            help="Inputs of a block: hidden states alone, with a padding mask, or with a key/value cache.",
            show_default="plain",
        ),
    ] = None,
    logits: Annotated[
        Literal["all", "last"] | None,
        typer.Option(help="Positions for which a model returns logits: all new ones, or the last.", show_default="all"),
    ] = None,
    cache: Annotated[
        Literal["growing", "in-place"] | None,
        typer.Option(
            help="Key/value cache of a model: returned with new tokens appended, or updated in place (aoti and pt2).",
            show_default="growing",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Dtype of weights and graph: float32, float16 or bfloat16.", metavar="DTYPE"),
    ] = "float32",
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Device that the bundle is made for and verified on.", show_default="cpu; cuda for flash2"),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Largest batch.")] = 32,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(help="Longest sequence, past included.", show_default="that of config.json, or 2048"),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX operator set, 18 to 24; Attention nodes from 23 on.", show_default="23 for onnx"),
    ] = None,
    onnx_flavor: Annotated[
        str | None,
        typer.Option(
            help="ONNX operators: standard, or ort for those that onnxruntime runs fastest.", show_default="standard"
        ),
    ] = None,
    attention_impl: Annotated[
        str, typer.Option(help="Attention implementation: one of those that the format includes, or auto.")
    ] = "auto",
    runtime: Annotated[
        Literal["native", "reference"],
        typer.Option(
            help="Runtime for verification: the format's own, or onnx.reference (slow, but supports every dtype)."
        ),
    ] = "native",
    seed: Annotated[int, typer.Option(help="Seed for the verification inputs.")] = 0,
    cases: Cases = None,
    weights: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Quantise the matrices of a model; needs --onnx-flavor ort.", show_default="not quantised"),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Number of weights per scale.", show_default="32")] = None,
    activations: Annotated[
        Literal["float32", "int8"] | None,
        typer.Option(
            help="Precision of the inputs of quantised matrices; int8 for products of integers.", show_default="float32"
        ),
    ] = None,
    quantise_head: Annotated[bool, typer.Option("--quantize-head", help="Quantise the output head, too.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text on which the loss from --weights is measured.",
            exists=True,
            dir_okay=False,
            show_default="Python's filecmp.py",
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Fail above this KL divergence from the original, in nats per token.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Fail if the top token agrees with the original for less than this share of tokens, 0 to 1."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle at --output.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the verification; the bundle records that.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Package a whole model, or a differential-attention block, as a verified bundle.

    Without CHECKPOINT, it exports the trained sample model that comes with diffdeploy. A checkpoint with a token
    embedding is a model; --layer exports a block of it.

    Nothing is left at --output unless the artifact passes.
    """
    with activity("loading torch", stages=False):
        from diffdeploy.checkpoints import CheckpointOptions, holds_model
        from diffdeploy.checkpoints.files import SAMPLE
        from diffdeploy.formats import ExportOptions

    of_weights = {"--block-size": block_size, "--activations": activations, "--quantize-head": quantise_head or None}
    of_loss = {"--text": text, "--max-kl": max_kl, "--min-agreement": min_agreement}
    _require_weights(weights, {**of_weights, **of_loss})
    if no_verify:
        of_checks = {"--cases": cases, "--runtime": None if runtime == "native" else runtime, "--seed": seed or None}
        refuse_together("--no-verify", "runs no verification", of_checks)
    checkpoint = SAMPLE if checkpoint is None else checkpoint
    is_model = layer is None and holds_model(checkpoint, reading["names"])
    if is_model and format_name == "all":
        raise InputError("--format all compares the formats of one block; give --layer, or the name of a format")
    if is_model and graph is not None:
        raise InputError(f"--graph is {graph}, which is for a block, but {checkpoint} is a whole model; give --layer")
    for option, given in {"--logits": logits, "--cache": cache, "--weights": weights}.items():
        if not is_model and given is not None:
            raise InputError(f"{option} is for whole models, but this is a block; omit it")
    options = ExportOptions(
        format=format_name,
        graph="model" if is_model else graph or "plain",
        dtype=dtype,
        max_batch_size=max_batch_size,
        max_sequence_length=max_sequence_length,
        device=device,
        opset=opset,
        onnx_flavor=onnx_flavor,
        runtime=runtime,
        impl=attention_impl,
        seed=seed,
        cases=selection_of(cases) or "full",
        logits=logits or "all",
        cache=cache or "growing",
        weights=weights,
        block_size=block_size,
        activations=activations,
        quantise_head=quantise_head,
        text=text,
        max_kl=max_kl,
        min_agreement=min_agreement,
    )
    number = None if layer in (None, "all") else _layer_number(layer)
    job = Job(checkpoint, CheckpointOptions(layer=number, **reading), options, force=force, verify=not no_verify)
    # The table of all formats covers only one layer.
    if layer == "all" and format_name == "all":
        raise InputError("--layer is all and --format is all; name one layer or one format")
    if layer == "all":
        return export_all(job, output, as_json=as_json)
    if format_name == "all":
        return export_formats(job, output, as_json=as_json)
    job.check_output(output)
    done = job.run(output)
    return done.finish(as_json=as_json)


def _require_weights(weights: str | None, of_weights: Mapping[str, object]) -> None:
    """Reject options for quantised weights if there are none."""
    if weights is None and (lonely := [option for option, given in of_weights.items() if given is not None]):
        raise InputError(f"{', '.join(lonely)} cannot be used without quantised weights; give --weights int8 or int4")


def _layer_number(text: str | None) -> int:
    try:
        # The option is text, since `all` is accepted, too.
        return int(text or "")
    except ValueError as error:
        raise InputError(f"--layer is {text!r}; accepted: a number or all") from error
