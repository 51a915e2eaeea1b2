"""Options that several commands share."""

from collections.abc import Callable, Iterable
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
    "selection_of",
    "takes_quiet",
    "with_parameters",
]

AsJson = Annotated[bool, typer.Option("--json", help="Result as one JSON object.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="what the bundle was made for, else cpu")
]
Threads = Annotated[int | None, typer.Option(help="Of the backend on the CPU.", show_default="its own choice")]
RuntimeName = Annotated[
    Literal["native", "reference", "openvino"],
    typer.Option("--runtime", help="openvino; or reference: ONNX by onnx.reference, slow, in every dtype."),
]
Recompile = Annotated[
    bool, typer.Option("--recompile", help="Compile a compile bundle afresh, on a machine it was not made for.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load a bundle from elsewhere although its format runs code when it is loaded.")
]
PublicKey = Annotated[
    Path | None,
    typer.Option(help="Load a bundle only if this key (PEM) signed it; it is trusted then.", show_default="any bundle"),
]
Cases = Annotated[str | None, typer.Option(help="Inputs to verify on: quick, full or a number.", show_default="full")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result, warnings and errors, nothing else.")]


def with_parameters(command: Callable[..., int], parameters: Iterable[Parameter]) -> Callable[..., int]:
    """Give a function that takes anything the parameters that typer makes options of."""
    parameters = list(parameters)
    # Both are what typer looks at.
    command.__signature__ = Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def takes_quiet(command: Callable[..., int]) -> Callable[..., int]:
    """The command with ``--quiet``."""

    @wraps(command)
    def run_command(*arguments: Any, quiet: bool, **options: Any) -> int:
        with console.quietly(quiet):
            return command(*arguments, **options)

    own = signature(command).parameters.values()
    quiet = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    return with_parameters(run_command, [*own, quiet])


def selection_of(cases: str | None) -> "Selection | None":
    """What ``--cases`` says; ``None`` where it was not given.

    Raises:
        InputError: it is none of the three.
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
    raise InputError(f"--cases is {cases!r}; accepted is quick, full or a number above 0")
