"""Proof that a bundle comes from a checkpoint, which is read and cast again and must give identical bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.arrays import ArrayView, to_tensor
from diffdeploy.bundle import WEIGHTS, Manifest, Provenance, cast_weights, open_bundle, quantised, with_own_head
from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, ModelCheckpoint, read_checkpoint, read_model
from diffdeploy.checkpoints.fields import shortened
from diffdeploy.config import AnyModel, DecoderConfig
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.formats import Check

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["matches_checkpoint"]


def matches_checkpoint(bundle: str | Path, checkpoint: str | Path) -> Check:
    """Check that a bundle has the weights and config of a checkpoint, and makes only true claims about the checkpoint.

    Raises:
        InputError: the checkpoint cannot be read with the options of the export.
        IntegrityError: the bundle is not what was exported, or does not say how the checkpoint was read.
    """
    from safetensors.torch import load_file

    manifest = open_bundle(bundle).manifest
    source = manifest.provenance
    try:
        options = CheckpointOptions.from_given(source.options)
    except InputError as error:
        raise IntegrityError(f"manifest.json in {bundle} does not say how to read the checkpoint: {error}") from error
    is_model = isinstance(manifest.config, DecoderConfig)
    found = read_model(checkpoint, options) if is_model else read_checkpoint(checkpoint, options)
    # Cast as in the export, since a bundle contains weights in the artifact's dtype.
    config, read = _as_stored(found, manifest)
    stored = load_file(Path(bundle) / WEIGHTS)
    problems = [] if config == manifest.config else ["its config differs"]
    if read.keys() != stored.keys():
        problems.append("its weights have other names")
    problems += [
        f"{name} differs"
        for name in sorted(read.keys() & stored.keys())
        if read[name].shape != stored[name].shape or not bool((read[name] == stored[name]).all())
    ]
    problems += _false_claims(found, source)
    names = ", ".join(file.name for file in found.files)
    others = "" if _digests(found) == _claimed_digests(source) else "; the manifest names other files"
    fine = f"the weights are those of {names}, bit for bit{others}"
    return Check(name="origin", passed=not problems, detail="; ".join(problems) or fine)


def _as_stored(found: Checkpoint | ModelCheckpoint, manifest: Manifest) -> "tuple[AnyModel, Mapping[str, Tensor]]":
    """Config and weights in the form in which an export of the checkpoint stores them."""
    config, weights, quantisation = found.config, found.weights, manifest.options.quantisation
    if quantisation is None:
        return config, cast_weights(weights, manifest.graph.dtype)
    if quantisation.head:
        config, weights = with_own_head(config, weights)
    stored = quantised(ArrayView(cast_weights(weights, manifest.graph.dtype)), quantisation)
    return config, {name: to_tensor(array) for name, array in stored.items()}


def _false_claims(found: Checkpoint | ModelCheckpoint, source: Provenance) -> list[str]:
    """False claims of a manifest about the checkpoint."""
    facts: list[tuple[str, object, object]] = [("layer", found.layer, source.layer)]
    # The same weights may have been saved again, in other files and with other keys.
    if _digests(found) == _claimed_digests(source):
        sizes = {file.name: file.size for file in found.files}
        facts += [("sizes of files", sizes, {name: file.size for name, file in source.files.items()})]
        facts += [("layout", found.layout, source.layout), ("keys", found.keys, source.keys)]
        facts += [("defaults", found.defaults, source.defaults)]
    return [
        f"the manifest has {name} {shortened(claimed)}, but the checkpoint has {shortened(here)}"
        for name, here, claimed in facts
        if here != claimed
    ]


def _digests(found: Checkpoint | ModelCheckpoint) -> dict[str, str]:
    return {file.name: file.sha256 for file in found.files}


def _claimed_digests(source: Provenance) -> dict[str, str]:
    return {name: file.sha256 for name, file in source.files.items()}
