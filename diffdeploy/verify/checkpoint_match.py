"""Proof that a bundle comes from a checkpoint: read again, cast again, the same bits."""

from pathlib import Path

from diffdeploy.bundle import WEIGHTS, cast_weights, open_bundle
from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint, read_model
from diffdeploy.config import DecoderConfig
from diffdeploy.formats import Check

__all__ = ["matches_checkpoint"]


def matches_checkpoint(bundle: str | Path, checkpoint: str | Path) -> Check:
    """Whether the weights and the config of a bundle are those of a checkpoint's block.

    Raises:
        InputError: the checkpoint cannot be read as it was for the export.
        IntegrityError: the bundle is not what was exported.
    """
    from safetensors.torch import load_file

    manifest = open_bundle(bundle).manifest
    options = CheckpointOptions.from_given(manifest.provenance.options)
    is_model = isinstance(manifest.config, DecoderConfig)
    found = read_model(checkpoint, options) if is_model else read_checkpoint(checkpoint, options)
    # Cast as for the export, since a bundle holds weights in the artifact's dtype.
    read, stored = cast_weights(found.weights, manifest.graph.dtype), load_file(Path(bundle) / WEIGHTS)
    problems = [] if found.config == manifest.config else ["its config is another"]
    if read.keys() != stored.keys():
        problems.append("its weights have other names")
    problems += [
        f"{name} differs"
        for name in sorted(read.keys() & stored.keys())
        if read[name].shape != stored[name].shape or not bool((read[name] == stored[name]).all())
    ]
    detail = (
        "; ".join(problems) or f"the weights are those of {', '.join(file.name for file in found.files)}, bit for bit"
    )
    return Check(name="origin", passed=not problems, detail=detail)
