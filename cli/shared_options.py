"""Options that several commands share."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffdeploy.cli import console
from diffdeploy.errors import InputError

if TYPE_CHECKING:
    from diffdeploy.formats import Selection

__all__ = [
    "AsJson",
    "Cases",
    "Device",
    "PublicKey",
    "Recompile",
    "RuntimeName",
    "Threads",
    "Trust",
    "refuse_together",
    "selection_of",
    "takes_quiet",
    "with_parameters",
]

AsJson = Annotated[bool, typer.Option("--json", help="Result as one JSON object.")]
Device = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda or cuda:N.", show_default="what the bundle was made for, else cpu")
]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads.", show_default="the backend's choice")]
RuntimeName = Annotated[
    Literal["native", "reference", "openvino"],
    typer.Option(
        "--runtime",
        help="Runtime: the format's own; for ONNX, also openvino, or onnx.reference (slow, but supports every dtype).",
    ),
]
Recompile = Annotated[
    bool,
    typer.Option(
        "--recompile", help="Recompile a bundle of format compile on a machine other than the one it was made on."
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load a bundle from elsewhere even if its format runs code when it is loaded.")
]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        help="Public key (PEM) that the bundle's signature must match; the bundle is then trusted.",
        show_default="signatures are not checked",
    ),
]
Cases = Annotated[
    str | None, typer.Option(help="Verification inputs: quick, full or a number of cases.", show_default="full")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result, warnings and errors.")]


def with_parameters(command: Callable[..., int], parameters: Iterable[Parameter]) -> Callable[..., int]:
    """Set the signature that typer reads, for a function that takes arbitrary arguments."""
    parameters = list(parameters)
    # typer reads both attributes.
    command.__signature__ = Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def takes_quiet(command: Callable[..., int]) -> Callable[..., int]:
    """Add ``--quiet`` to a command."""

    @wraps(command)
    def run_command(*arguments: Any, quiet: bool, **options: Any) -> int:
        with console.quietly(quiet):
            return command(*arguments, **options)

    own = signature(command).parameters.values()
    quiet = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    return with_parameters(run_command, [*own, quiet])


def refuse_together(option: str, why: str, others: Mapping[str, object]) -> None:
    """Refuse options that cannot be combined.

    Args:
        option: the option, or a command without one, such as ``verify without --engine``.
        why: rest of a sentence that begins with ``option``.
        others: value of each option by its name; ``None`` if it was not given.

    Raises:
        InputError: one of the others was given.
    """
    if given := [name for name, value in others.items() if value is not None]:
        raise InputError(f"{option} {why}, so it cannot be combined with {', '.join(given)}; omit one")


def selection_of(cases: str | None) -> "Selection | None":
    """Value of ``--cases``; ``None`` if it was not given.

    Raises:
        InputError: it is neither quick, full nor a number above 0.
    """
    if cases is None:
        return None
    if cases == "quick":
        return "quick"
    if cases == "full":
        return "full"
    # Not int() in a try, which accepts -3, +3 and 1_000.
    if cases.isdecimal() and int(cases) > 0:
        return int(cases)
    raise InputError(f"--cases is {cases!r}; accepted: quick, full or a number above 0")
