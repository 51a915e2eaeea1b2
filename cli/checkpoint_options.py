"""Options for facts that a checkpoint may not record, shared by all commands that read one."""

import json
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffdeploy.cli.completion import complete_layout
from diffdeploy.cli.shared_options import with_parameters
from diffdeploy.errors import InputError

__all__ = ["takes_checkpoint_options"]


# Named like the fields of `diffdeploy.checkpoints.CheckpointOptions`, except `layer`, which commands define.
def _options(
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of the checkpoint.", show_default="recognised by its keys", autocompletion=complete_layout
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Prefix of the keys of the block.", show_default="that of the block at --layer, or of the only block"
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="0-based layer index that sets lambda_init.", show_default="taken from the keys")
    ] = None,
    lambda_init: Annotated[
        float | None, typer.Option(help="Constant part of lambda, given directly.", show_default="derived from --depth")
    ] = None,
    output_scale: Annotated[
        float | None, typer.Option(help="Factor that follows the per-head norm.", show_default="1 - lambda_init")
    ] = None,
    causal: Annotated[
        bool | None,
        typer.Option("--causal/--no-causal", help="Hide later positions.", show_default="as in the layout"),
    ] = None,
    sliding_window: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of keys that each position attends to; 0 for all.", show_default="from config.json"
        ),
    ] = None,
    norm: Annotated[
        Literal["rms", "layer", "none"] | None,
        typer.Option(
            help="Per-head norm; layer is LayerNorm, which also subtracts the mean.",
            show_default="as in the layout",
        ),
    ] = None,
    norm_eps: Annotated[
        float | None,
        typer.Option(help="Epsilon of the per-head norm.", show_default="from config.json, or 1e-5"),
    ] = None,
    qk_norm_eps: Annotated[
        float | None,
        typer.Option(help="Epsilon of the norms of queries and keys.", show_default="as in the layout"),
    ] = None,
    rope: Annotated[
        Literal["interleaved", "half", "half-reversed", "none"] | None,
        typer.Option(
            help="Rotary embedding: interleaved, half, half-reversed (half with the negative angle) or none.",
            metavar="KIND",
            show_default="from config.json",
        ),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Base of the rotary frequencies.", show_default="from config.json")
    ] = None,
    gqa_layout: Annotated[
        Literal["canonical", "legacy"] | None,
        typer.Option(help="Assignment of key streams to query streams.", show_default="from config.json"),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the names of a model's tensors outside its blocks.",
            show_default="those of known models",
        ),
    ] = None,
) -> None:
    """Do nothing; only the signature is used."""


def _table(path: Path | None) -> str | None:
    """Read the JSON in a file and return it on one line."""
    if path is None:
        return None
    try:
        return json.dumps(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--names {path} cannot be read: {error}") from error


def takes_checkpoint_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace a command's keyword parameter ``reading`` with these options; the command gets their values by name."""
    added = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in signature(_options).parameters.values()]
    parameters: list[Parameter] = []
    for own in signature(command).parameters.values():
        parameters += added if own.name == "reading" else [own]

    @wraps(command)
    def run_command(**given: Any) -> int:
        reading = {option.name: given.pop(option.name) for option in added}
        reading["names"] = _table(reading["names"])
        return command(**given, reading=reading)

    return with_parameters(run_command, parameters)
