"""``diffdeploy verify``: everything that accepted a bundle, again, from the bundle alone."""

from pathlib import Path
from typing import Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.results import finish

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Prove that the weights are still those of this checkpoint.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the inputs.", show_default="as the bundle was made")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False,
) -> int:
    """Check a bundle's digests, structure and numbers, on this machine.

    The exact result is computed in fp64 from the weights in the bundle; the checkpoint is not needed.

    With --checkpoint, its block is read again as for the export, and must give the same weights bit for bit.
    """
    with console.activity("opening the bundle") as activity:
        from diffdeploy.verify import verify_bundle

        report = verify_bundle(bundle, seed=seed, progress=activity.progress)
        if checkpoint is not None:
            from diffdeploy.exporters.origin import check_origin

            activity.stage("reading the checkpoint")
            report = report.with_check(check_origin(bundle, checkpoint))
    error = None if report.passed else f"{bundle} failed verification: {report.first_failure()}"
    return finish(report, bundle, as_json=as_json, error=error)
