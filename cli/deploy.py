"""``diffdeploy deploy``: writes a bundle in the form that a third-party server reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffdeploy.cli import console
from diffdeploy.cli.shared_options import AsJson, PublicKey

__all__ = ["deploy"]


def deploy(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model repository; other models in it are kept.")],
    target: Annotated[Literal["triton"], typer.Option("--to", help="triton: Triton Inference Server.")] = "triton",
    name: Annotated[
        str | None, typer.Option(help="Name of the model.", show_default="that of the bundle's directory")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> int:
    """Write a model into a Triton repository: the bundle's files, and a config.pbtxt from its manifest."""
    from diffdeploy.bundle import open_bundle
    from diffdeploy.engines.triton import deploy_to_triton

    opened = open_bundle(bundle, public_key)
    model = deploy_to_triton(opened, output, name=bundle.resolve().name if name is None else name, force=force)
    if not opened.verified:
        console.note(f"{bundle} was exported without verification; run diffdeploy verify {bundle}")
    files = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    if as_json:
        fields = {"status": "written", "bundle": str(bundle), "target": target, "output": str(model), "files": files}
        console.print_json(fields)
    else:
        console.print_text(f"wrote {model}: {', '.join(files)}")
    return 0
