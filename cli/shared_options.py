"""Options that several commands share."""

from typing import Annotated, Literal

import typer

__all__ = ["AsJson", "Device", "Recompile", "RuntimeName", "Threads", "Trust"]

AsJson = Annotated[bool, typer.Option("--json", help="Result as one JSON object.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="what the bundle was made for, else cpu")
]
Threads = Annotated[int | None, typer.Option(help="Of the backend on the CPU.", show_default="its own choice")]
RuntimeName = Annotated[
    Literal["native", "reference"],
    typer.Option("--runtime", help="reference: ONNX by onnx.reference, slow, in every dtype."),
]
Recompile = Annotated[
    bool, typer.Option("--recompile", help="Compile a compile bundle afresh, on a machine it was not made for.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Load a bundle from elsewhere although its format runs code when it is loaded.")
]
