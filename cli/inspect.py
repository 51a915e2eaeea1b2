"""``diffdeploy inspect``: shows what a bundle or a checkpoint holds."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffdeploy.cli import console
from diffdeploy.cli.completion import complete_layout
from diffdeploy.cli.layer_rows import by_layer, of_layers
from diffdeploy.cli.progress import activity
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from diffdeploy.bundle import Bundle
    from diffdeploy.checkpoints import BlockSummary
    from diffdeploy.config import AnyConfig, LambdaKind

__all__ = ["inspect"]


def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle or a checkpoint.", metavar="BUNDLE|CHECKPOINT")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of a checkpoint.", show_default="recognised by its keys", autocompletion=complete_layout
        ),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Also draw the graph around the attention of one layer, as an .svg file.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="0-based layer of a model that --draw shows.", show_default="the first")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False,
) -> int:
    """Show what a bundle or a checkpoint holds, without running it."""
    from diffdeploy.bundle import SIGNATURE, is_bundle, open_bundle
    from diffdeploy.runtime import least_versions

    if layer is not None and draw is None:
        raise InputError(f"--layer {layer} selects the layer that --draw shows; give --draw, too")
    # Both may be folders; only a bundle has a manifest.
    if draw is not None and not is_bundle(path):
        raise InputError(f"--draw needs the graph of a bundle, but {path} is not a bundle; export it first")
    if is_bundle(path):
        if draw is not None:
            _check_drawing(draw)
        bundle = open_bundle(path)
        if draw is not None:
            _draw(bundle, layer or 0, draw)
        signed = (path / SIGNATURE).exists()
        if as_json:
            fields = {
                "signature": SIGNATURE if signed else None,
                **bundle.manifest.model_dump(mode="json"),
                "requires": least_versions(bundle.manifest),
            }
            console.print_json({"kind": "bundle", "path": str(path), **fields})
        else:
            checked = "signed; checked only with verify --public-key" if signed else "none"
            console.print_rows([*_bundle_rows(bundle), ("signature", checked)])
        return 0
    with activity("reading the checkpoint", stages=False):
        # Checkpoints need torch; bundles are described without it.
        from diffdeploy.checkpoints import holds_model, summarise

        found, is_model = summarise(path, layout), holds_model(path)
    if as_json:
        fields = asdict(found)
        layers = fields.pop("blocks")
        console.print_json(
            {"kind": "checkpoint", "path": str(path), "whole_model": is_model, "layers": layers, **fields}
        )
        return 0
    also = f"; {', '.join(found.also)} has the same keys" if found.also else ""
    console.print_text(f"checkpoint {path}: {len(found.blocks)} differential-attention blocks")
    if is_model:
        console.print_text(
            "it has a token embedding: export packages the whole model, and export --layer one of its blocks"
        )
    console.print_text(f"layout {found.layout} (version {found.version}), recognised by {found.why}{also}")
    for block in found.blocks:
        console.print_text("")
        console.print_rows(_block_rows(block, found.lambda_kind))
    return 0


def _check_drawing(target: Path) -> None:
    from diffdeploy.files import check_writable

    if target.suffix != ".svg":
        raise InputError(f"--draw is {target}; accepted: file names that end in .svg")
    check_writable(target)


def _draw(bundle: "Bundle", layer: int, target: Path) -> None:
    """Draw the attention part of a layer.

    Raises:
        InputError: the format has no readable graph, or the graph has no such layer.
    """
    from diffdeploy.cli.drawing import draw
    from diffdeploy.files import write_whole
    from diffdeploy.formats import require_format

    manifest = bundle.manifest
    nodes = require_format(manifest.format).nodes(bundle)
    if nodes is None:
        raise InputError(
            f"format {manifest.format} has no graph that can be read, so there is nothing to draw; draw the bundle of "
            "the same block in another format"
        )
    num_layers = len(manifest.config.blocks)
    if layer >= num_layers:
        raise InputError(f"--layer is {layer}; the graph has {num_layers} layers, counted from 0")
    each = sum(node.kind == "attention" for node in nodes) // num_layers
    title = f"{bundle.path.name}: {manifest.format}, {manifest.graph.variant}, attention of layer {layer}"
    write_whole(target, draw(nodes, range(layer * each, (layer + 1) * each), title))
    console.note(f"drew {target}")


def _bundle_rows(bundle: "Bundle") -> list[tuple[str, str]]:
    from diffdeploy.runtime import least_versions

    manifest = bundle.manifest
    config, source = manifest.config.attention, manifest.provenance
    blocks = list(manifest.config.blocks.values())
    rope = "none" if config.rope is None else f"{config.rope.style}, theta {config.rope.theta:g}"
    axes = ", ".join(f"{name} {bounds.min} to {bounds.max}" for name, bounds in manifest.graph.axes.items())

    def tensors(heading: str, specs: Any) -> list[tuple[str, str]]:
        rows = by_layer((name, f"{spec.dtype} [{', '.join(map(str, spec.shape))}]") for name, spec in specs.items())
        # Each tensor has its own line; only the first line has the heading.
        return [("" if number else heading, f"{name} {what}") for number, (name, what) in enumerate(rows)]

    layer = "" if source.layer is None else f", layer {source.layer}"
    return [
        ("bundle", str(bundle.path)),
        ("format", manifest.format + (", verified when it was made" if bundle.verified else ", NOT verified")),
        ("options", ", ".join(f"{name} {value}" for name, value in manifest.options.plain().items())),
        ("graph", manifest.graph.variant),
        *tensors("inputs", manifest.graph.inputs),
        *tensors("outputs", manifest.graph.outputs),
        ("ranges", axes),
        *_model_rows(bundle),
        ("width", f"{config.embed_dim}"),
        ("heads", _heads(config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim)),
        ("rope", rope),
        ("causal", "yes" if config.causal else "no"),
        ("window", of_layers("none" if b.sliding_window is None else f"{b.sliding_window} keys" for b in blocks)),
        *_version_rows(blocks),
        ("from", f"{', '.join(source.files)}{layer}, layout {source.layout}"),
        *(("needs", f"{name} {least} or newer") for name, least in least_versions(manifest).items()),
        ("made with", ", ".join(f"{name} {found}" for name, found in manifest.environment.packages.items())),
        ("files", ", ".join(f"{name} ({file.size:,} bytes)" for name, file in manifest.files.items())),
    ]


def _model_rows(bundle: "Bundle") -> list[tuple[str, str]]:
    """Rows for the parts of a whole model around its blocks."""
    from diffdeploy.config import DecoderConfig
    from diffdeploy.runtime import eos_of

    config = bundle.manifest.config
    if not isinstance(config, DecoderConfig):
        return []
    mlps = dict.fromkeys(f"{layer.mlp.kind}, width {layer.mlp.hidden_dim}" for layer in config.layers)
    head = "head tied to the embedding" if config.tied else "separate head"
    ends = ", ".join(map(str, eos_of(bundle)))
    beside = [name for name in ("tokenizer.json", "chat_template.jinja") if name in bundle.manifest.files]
    return [
        ("model", f"{config.num_layers} layers, {config.vocab_size} tokens, {head}"),
        ("mlp", "; ".join(mlps)),
        *_quantisation_rows(bundle),
        (
            "text",
            f"{', '.join(beside) or 'no tokenizer.json'}; " + (f"end token {ends}" if ends else "no end token"),
        ),
    ]


def _quantisation_rows(bundle: "Bundle") -> list[tuple[str, str]]:
    """Rows for the quantised matrices of a model, and for their loss if the report has it."""
    from diffdeploy.bundle import REPORT
    from diffdeploy.verify.report import read_report

    manifest = bundle.manifest
    if (how := manifest.options.quantisation) is None:
        return []
    matrices = "projections and MLPs" + (", and the head" if how.head else "")
    whole = f"all else {manifest.graph.dtype}" + ("" if how.head else ", the head too")
    rows = [
        (
            "weights",
            f"{how.weights} in blocks of {how.block_size}, accuracy level {how.accuracy_level}: {matrices}; {whole}",
        ),
        *(
            [("activations", f"{how.activations} in blocks of {how.block_size}, as inputs of these matrices")]
            if how.activation_blocks
            else []
        ),
    ]
    loss = read_report(bundle.path / REPORT).loss if REPORT in manifest.files else None
    return rows if loss is None else [*rows, ("loss", loss.summary)]


def _heads(num_heads: int | None, num_kv_heads: int | None, head_dim: int | None, value_dim: int | None) -> str:
    """Sizes of heads, in the same words for a bundle and for the checkpoint that it came from."""
    values = f"{num_kv_heads} key/value heads with values of width {value_dim}"
    return f"{num_heads} with two streams of width {head_dim} each, {values}"


def _window(block: "BlockSummary") -> str:
    if not block.window_is_known:
        return "not recorded: give --sliding-window"
    return "none" if block.sliding_window is None else f"{block.sliding_window} keys"


def _version_rows(blocks: "list[AnyConfig]") -> list[tuple[str, str]]:
    # Layers of a model differ in lambda_init and the factor that follows from it, and in nothing else that is shown.
    config = blocks[0]
    norms = [] if config.qk_norm_eps is None else [("query, key norms", f"eps {config.qk_norm_eps:g}")]
    if config.lambda_kind == "token":
        return [("version", "2: lambda per token and head, no per-head norm"), *norms]
    kinds = {"layer": "one lambda", "head": "one lambda for each head", "fixed": "which is lambda itself"}
    affine = "with gamma" if config.norm_affine else "without gamma"
    known = [block for block in blocks if block.lambda_kind != "token"]
    inits, scales = (
        ", ".join(dict.fromkeys(f"{value:.6g}" for value in values))
        for values in ([block.lambda_init for block in known], [block.output_scale for block in known])
    )
    return [
        (
            "lambda_init",
            f"{inits}, {kinds[config.lambda_kind]}; output scale {scales}",
        ),
        ("norm", "none" if config.norm_eps is None else f"eps {config.norm_eps:g}, {affine}"),
        *norms,
        ("gqa layout", config.gqa_layout),
    ]


def _block_rows(block: "BlockSummary", lambda_kind: "LambdaKind") -> list[tuple[str, str]]:
    if block.refused is not None:
        return [("block", block.prefix.rstrip(".")), ("refused", block.refused)]

    def known(value: object, option: str) -> str:
        return f"not recorded: give {option}" if value is None else str(value)

    def number(value: float | None) -> str:
        return "not known: give --depth" if value is None else f"{value:.6g}"

    theta = "" if block.rope_theta is None else f", theta {block.rope_theta:g}"
    one_lambda = number(block.lambda_value) if lambda_kind in ("layer", "fixed") else "one for each head"
    lambdas = [("lambda_init", number(block.lambda_init)), ("lambda", one_lambda)]
    return [
        ("block", block.prefix.rstrip(".") or "at the top level"),
        ("layer", "no index in the keys" if block.layer is None else str(block.layer)),
        ("width", str(block.embed_dim)),
        ("heads", _heads(block.num_heads, block.num_kv_heads, block.head_dim, block.value_dim)),
        *(("in the config", said) for said in block.head_fields),
        ("norm", str(block.norm)),
        ("rope", known(block.rope, "--rope") + theta),
        ("window", _window(block)),
        ("gqa layout", known(block.gqa_layout, "--gqa-layout")),
        *([] if lambda_kind == "token" else lambdas),
        ("weights", f"{block.num_parameters:,} in {block.dtype}, {block.num_bytes:,} bytes"),
        *([("unread", ", ".join(block.unread) + "; the block cannot be exported with these")] if block.unread else []),
    ]
