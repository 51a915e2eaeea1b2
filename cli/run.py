"""``diffdeploy run``: one call of a bundle, from a file of inputs to a file of outputs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffdeploy.cli import console
from diffdeploy.cli.layer_rows import by_layer
from diffdeploy.cli.progress import activity
from diffdeploy.cli.shared_options import AsJson, Device, PublicKey, Recompile, RuntimeName, Threads, Trust

if TYPE_CHECKING:
    from diffdeploy.arrays import Array

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(help="Directory that diffdeploy export made.")],
    inputs: Annotated[
        Path, typer.Option("--input", "-i", help=".safetensors or .npz file with the graph's inputs by name.")
    ],
    outputs: Annotated[Path, typer.Option("--output", "-o", help=".safetensors or .npz file to write.")],
    device: Device = None,
    threads: Threads = None,
    runtime: RuntimeName = "native",
    recompile: Recompile = False,
    trust: Trust = False,
    public_key: PublicKey = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file at --output.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a bundle once on inputs from a file, and write its outputs to a file."""
    from diffdeploy.files import check_target, read_arrays, write_arrays

    # Checked before anything is loaded, which may take longer than the run.
    check_target(outputs, force=force)
    with activity("opening the bundle", stages=False) as doing:
        import numpy as np

        from diffdeploy.formats import RunOptions
        from diffdeploy.runtime import open_runtime

        arrays = read_arrays(inputs)
        options = RunOptions(
            device=device,
            threads=threads,
            runtime=runtime,
            recompile=recompile,
            trust=trust,
            public_key=public_key,
        )
        with open_runtime(bundle, options) as loaded:
            if not loaded.verified:
                console.note(f"{bundle} was exported without verification; run diffdeploy verify {bundle}")
            doing.phase("running")
            for name, array in arrays.items():
                if _is_floating(array) and not np.isfinite(array.astype(np.float32)).all():
                    console.warn(f"{name} in {inputs} holds NaN or infinity")
            results = loaded(**arrays)
            # Read inside the ``with`` block, after which the runtime is closed.
            backend = loaded.description
        write_arrays(outputs, results)
    _print(results, bundle, outputs, backend, as_json=as_json)
    return 0


def _is_floating(array: "Array") -> bool:
    """True if an array can hold NaN; bfloat16 shares numpy's kind V with records, which the runtime refuses."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _print(results: "dict[str, Array]", bundle: Path, outputs: Path, backend: str, *, as_json: bool) -> None:
    if as_json:
        shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in results.items()}
        console.print_json(
            {"status": "ran", "bundle": str(bundle), "output": str(outputs), "backend": backend, "outputs": shapes}
        )
        return
    rows = by_layer((name, f"{array.dtype.name} {list(array.shape)}") for name, array in results.items())
    said = ", ".join(f"{name} {what}" for name, what in rows)
    console.print_text(f"wrote {outputs}: {said} ({backend})")
