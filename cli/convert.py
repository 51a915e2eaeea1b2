"""``diffdeploy convert``: converts any checkpoint to a directory that transformers and other tools can read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffdeploy.cli import console
from diffdeploy.cli.checkpoint_options import takes_checkpoint_options
from diffdeploy.cli.interrupts import keeping
from diffdeploy.cli.progress import activity
from diffdeploy.cli.shared_options import AsJson, takes_quiet

if TYPE_CHECKING:
    from diffdeploy.exporters import Conversion

__all__ = ["convert"]


@takes_quiet
@takes_checkpoint_options
def convert(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help=".safetensors or .pt file, or a directory with one.", show_default="the bundled sample"),
    ] = None,
    target: Annotated[
        Literal["diffllama"], typer.Option("--to", help="diffllama: transformers' DiffLlamaForCausalLM.")
    ] = "diffllama",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory of the checkpoint.", show_default="artifacts/NAME-diffllama"),
    ] = None,
    *,
    reading: dict[str, Any],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion at --output.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a whole model as a transformers checkpoint, and prove that it has the same logits.

    Nothing is left at --output unless the written checkpoint, when read back, has the logits of the original in fp64,
    up to the rounding of its dtype. A model that the target cannot represent is refused, with the reason.
    """
    with activity("reading the checkpoint") as doing:
        from diffdeploy.bundle import default_output
        from diffdeploy.checkpoints import CheckpointOptions, read_model
        from diffdeploy.checkpoints.files import SAMPLE
        from diffdeploy.exporters import convert_model
        from diffdeploy.exporters.convert import RECORD
        from diffdeploy.staging import check_directory

        source = SAMPLE if checkpoint is None else checkpoint
        name = source.resolve().name.removesuffix(source.suffix)
        place = output or default_output(name, None, target)
        # Checked before the checkpoint is read, which may take minutes.
        check_directory(place, marker=RECORD, what="conversion", force=force)
        found = read_model(source, CheckpointOptions(**reading))
        with keeping(place):
            done = convert_model(found, place, target=target, force=force, phase=doing.phase)
    if found.max_positions is None:
        console.note(
            f"the longest sequence is unknown; max_position_embeddings in {place / 'config.json'} is the default "
            "of transformers"
        )
    if as_json:
        console.print_json(_fields(done))
    else:
        worst = done.record.worst
        used = f"; worst {worst.id} used {console.share(worst.budget_used)} of its budget"
        console.print_text(f"passed: {place} ({len(done.record.cases)} cases{used})")
    return 0


def _fields(done: "Conversion") -> dict[str, Any]:
    """Fields for JSON."""
    worst = done.record.worst
    return {
        "status": "passed",
        "target": done.record.target,
        "output": str(done.path),
        "files": sorted(path.name for path in done.path.iterdir()),
        "dtype": done.record.dtype,
        "verification": {
            "passed": True,
            "num_cases": len(done.record.cases),
            "worst": {"case": worst.id, "budget_used": worst.budget_used},
            "cases": [case.model_dump(mode="json") for case in done.record.cases],
        },
    }
