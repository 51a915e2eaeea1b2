"""``diffdeploy verify``: everything that accepted a bundle, again, from the bundle alone."""

from pathlib import Path
from typing import Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.results import finish

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the inputs.", show_default="as the bundle was made")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False,
) -> int:
    """Check a bundle's digests, structure and numbers, on this machine.

    The exact result is computed in fp64 from the weights in the bundle; the checkpoint is not needed.
    """
    with console.activity("opening the bundle") as activity:
        from diffdeploy.verify import verify_bundle

        report = verify_bundle(bundle, seed=seed, progress=activity.progress)
    error = None if report.passed else f"{bundle} failed verification: {report.first_failure()}"
    return finish(report, bundle, as_json=as_json, error=error)
