"""Options that several commands share."""

from typing import Annotated, Literal

import typer

__all__ = [
    "AsJson",
    "Causal",
    "Depth",
    "Device",
    "KeyMap",
    "LambdaInit",
    "LayoutName",
    "NormEps",
    "NormName",
    "OutputScale",
    "Prefix",
    "QkNormEps",
    "Recompile",
    "Rope",
    "RopeTheta",
    "RuntimeName",
    "SlidingWindow",
    "Threads",
]

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

# What a checkpoint cannot say, see `diffdeploy.checkpoints.CheckpointOptions`.
LayoutName = Annotated[
    str | None, typer.Option("--layout", help="Layout of the checkpoint.", show_default="recognised by its keys")
]
Prefix = Annotated[
    str | None,
    typer.Option(help="What the keys of the block begin with.", show_default="that of the only block, or of --layer"),
]
Depth = Annotated[
    int | None, typer.Option(help="0-based layer index that sets lambda_init.", show_default="as the keys say")
]
LambdaInit = Annotated[
    float | None, typer.Option(help="Constant part of lambda itself.", show_default="as --depth gives it")
]
OutputScale = Annotated[
    float | None, typer.Option(help="Factor behind the norm of the heads.", show_default="1 - lambda_init")
]
Causal = Annotated[
    bool | None,
    typer.Option("--causal/--no-causal", help="Hide later positions.", show_default="as the layout has it"),
]
SlidingWindow = Annotated[
    int | None,
    typer.Option(min=0, help="Keys that a position sees; 0 for all.", show_default="as config.json says"),
]
NormName = Annotated[
    Literal["rms", "layer"] | None,
    typer.Option("--norm", help="Norm of the heads; layer subtracts their mean.", show_default="rms"),
]
NormEps = Annotated[
    float | None, typer.Option(help="Epsilon of the norm of the heads.", show_default="as config.json says, or 1e-5")
]
QkNormEps = Annotated[
    float | None,
    typer.Option(help="Epsilon of the norms of queries and keys.", show_default="as the layout has it"),
]
Rope = Annotated[
    Literal["interleaved", "half", "none"] | None,
    typer.Option(help="Rotary embedding.", show_default="as config.json says"),
]
RopeTheta = Annotated[
    float | None, typer.Option(help="Base of the rotary frequencies.", show_default="as config.json says")
]
KeyMap = Annotated[
    Literal["canonical", "legacy"] | None,
    typer.Option("--gqa-layout", help="Which key stream a query stream reads.", show_default="as config.json says"),
]
