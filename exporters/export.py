"""The life of an export: checkpoint, cast weights, lowered artifact, verification, then one rename into place."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import to_array
from diffdeploy.bundle import (
    GOLDEN,
    REPORT,
    WEIGHTS,
    Bundle,
    Environment,
    ExportRecord,
    FileDigest,
    Manifest,
    Provenance,
    frozen_module,
    remember_export,
    staged_bundle,
    write_manifest,
)
from diffdeploy.config import AnyModel
from diffdeploy.errors import DiffDeployError, ExportError, InputError, UnavailableError
from diffdeploy.exclusive import without_warnings
from diffdeploy.exporters.quantising import ShippedWeights, check_quantisation, loss_of, to_quantise
from diffdeploy.formats import (
    ArtifactFacts,
    ExportOptions,
    Format,
    RunOptions,
    Selection,
    distributions,
    require_format,
)
from diffdeploy.graphs import GraphSpec, graph_spec
from diffdeploy.runtime.machine import this_machine
from diffdeploy.verify import (
    Loss,
    Progress,
    RejectedError,
    Report,
    artifact_facts,
    golden_arrays,
    longest_case,
    verify_bundle,
)

if TYPE_CHECKING:
    from diffdeploy.checkpoints import Checkpoint, ModelCheckpoint
    from diffdeploy.modules import AnyModule

__all__ = ["Export", "export_bundle", "lower_block", "provenance_of", "settled_length"]

# Where neither the user nor the checkpoint says how long sequences get.
_MAX_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: where the bundle is.
        facts: what the artifact says of itself.
        report: of the verification that accepted it, if there was one.
        loss: by quantised weights, where it was measured.
    """

    path: Path
    facts: ArtifactFacts
    report: Report | None
    loss: Loss | None = None


def _checked_format(options: ExportOptions) -> Format:
    """The format of an export, after the checks that need no weights."""
    found = require_format(options.format)
    device = found.device_of(options)
    # First what no machine can do: it is the user's to change, not the machine's.
    if reason := found.why_not_made_for(device, options.dtype):
        raise InputError(reason)
    if reason := found.why_not_export(device, options.dtype):
        raise UnavailableError(reason)
    # Refused here and not by the operator: an implementation may exist, and yet be none that this format ships.
    if options.impl not in ("auto", *found.impls):
        raise InputError(
            f"attention implementation {str(options.impl)!r} is not what format {options.format} ships; "
            f"accepted: {', '.join(('auto', *found.impls))}"
        )
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}; accepted is 0 or more")
    found.check_options(options)
    return found


def settled_length(options: ExportOptions, checkpoint: "Checkpoint | ModelCheckpoint") -> tuple[int, str | None]:
    """The longest sequence, and a sentence where it is neither what was asked for nor what the checkpoint says.

    Left open, it is ``max_position_embeddings`` of ``config.json`` as far as a verification reaches, or 2048.
    """
    if options.max_sequence_length is not None:
        return options.max_sequence_length, None
    said = checkpoint.max_positions
    decodes = options.graph in ("cached", "model")
    reached = max(_MAX_SEQUENCE_LENGTH, longest_case(checkpoint.config.attention, decoding=decodes))
    taken = _MAX_SEQUENCE_LENGTH if said is None else min(said, reached)
    reason = None
    if said is not None and taken < said:
        reason = (
            f"max_position_embeddings is {said}, more than a verification reaches in memory; the longest sequence is "
            f"{taken}, or what --max-sequence-length says"
        )
    return taken, reason


def _impl(found: Format, options: ExportOptions, config: AnyModel) -> str:
    return found.fastest_impl(options, config) if options.impl == "auto" else str(options.impl)


def _write_weights(config: AnyModel, weights: ShippedWeights, spec: GraphSpec, seed: int, staging: Path) -> None:
    import safetensors.numpy

    computed = {name: to_array(tensor) for name, tensor in weights.computed.items()}
    # Golden vectors are of the cast and quantised weights: the artifact is to compute what it was given, not what the
    # checkpoint held before. Serialised first: the library's own file writer hides the reason when a disk is full.
    (staging / WEIGHTS).write_bytes(safetensors.numpy.save(dict(weights.stored)))
    (staging / GOLDEN).write_bytes(safetensors.numpy.save(golden_arrays(config, spec, computed, seed)))


def export_bundle(
    checkpoint: "Checkpoint | ModelCheckpoint",
    output: Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    verify: bool = True,
    phase: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Export:
    """Lower a block or model, verify the artifact, put the bundle at ``output``; whatever fails leaves nothing there.

    Args:
        checkpoint: the block or the model, from `diffdeploy.read_checkpoint` or `diffdeploy.read_model`.
        output: directory of the bundle; made with its parents.
        options: what to make.
        force: replace a bundle that is at ``output``.
        verify: run the verification; without it the manifest says that the bundle is not verified.
        phase: called with a few words when a phase of the export begins.
        progress: called with cases done, cases in all, and the name of the next one.

    Raises:
        InputError: an option, a weight or ``output`` is not acceptable.
        UnavailableError: a package or disk space is missing.
        ExportError: the block could not be lowered.
        RejectedError: the artifact does not compute what its weights and config say.
        VerificationError: quantised weights lose more than ``options`` allow.
    """
    import torch

    options = options or ExportOptions()
    check_quantisation(checkpoint, options)
    checkpoint = to_quantise(checkpoint, options)
    max_sequence_length, _ = settled_length(options, checkpoint)
    found = _checked_format(options)
    device = found.device_of(options)
    # Before the lowering, which takes minutes where it compiles.
    if verify and (reason := found.why_not_run(device, options.dtype, runtime=options.runtime)):
        raise UnavailableError(f"{reason}; --no-verify exports without running it")
    spec = graph_spec(
        options.graph,
        checkpoint.config,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        max_sequence_length=max_sequence_length,
        logits=options.logits,
        padding=found.padding(options.graph, options.onnx_flavor, checkpoint.config),
    )
    weights = ShippedWeights.of(checkpoint, options)
    report = None
    with staged_bundle(output, force=force) as staging:
        phase("lowering")
        # Before the lowering: aoti writes the digest of this file into its package.
        _write_weights(checkpoint.config, weights, spec, options.seed, staging)
        for companion in checkpoint.companions:
            shutil.copyfile(companion, staging / companion.name)
        length, dtype = spec.axes["sequence_length"].max, getattr(torch, spec.dtype)
        impl = _impl(found, options, checkpoint.config)
        block = frozen_module(checkpoint.config, weights.computed, impl=impl, max_positions=length, dtype=dtype)
        recorded = _lower(found, block, spec, staging, options)
        manifest = _manifest(checkpoint, spec, options, found, recorded)
        for name, content in found.engine_files(manifest, staging).items():
            (staging / name).write_bytes(content)
        # Signed as not verified, so that the verification opens the directory as any user would.
        manifest = write_manifest(staging, manifest)
        # Also of a bundle that is not verified: the command line reports them.
        facts = artifact_facts(Bundle(staging, manifest))
        if options.weights is not None:
            phase("measuring the loss")
        loss = loss_of(Bundle(staging, manifest), weights, options, progress)
        if verify:
            phase("verifying")
            # Made by this process, and not remembered before it is whole.
            run_options = RunOptions(device=device, runtime=options.runtime, trust=True)
            report = _accept(Bundle(staging, manifest), run_options, options.cases, progress, loss)
    remember_export(output)
    return Export(output, facts, report, loss)


def _accept(
    bundle: Bundle, run_options: RunOptions, cases: Selection, progress: Progress | None, loss: Loss | None
) -> Report:
    """Verify a bundle, and sign it as verified; the loss is written down beside the verdict.

    Raises:
        RejectedError: it failed.
    """
    report = verify_bundle(bundle.path, cases=cases, progress=progress, run_options=run_options)
    report = report.model_copy(update={"loss": loss})
    if not report.passed:
        raise RejectedError(
            f"the exported {bundle.manifest.format} artifact failed verification and was not kept: "
            f"{report.first_failure()}; --no-verify keeps one, for diffdeploy verify to look into",
            report,
        )
    # The report needs a digest too, so the manifest is signed again.
    (bundle.path / REPORT).write_bytes(report.to_bytes())
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"verified": True}))
    return report


def lower_block(block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> None:
    """Write the artifact of a block into a directory that holds its weights, and nothing else.

    Args:
        block: frozen block in the dtype of the graph, on the CPU.
        spec: interface of the graph.
        directory: existing directory.
        options: format and its options.

    Raises:
        InputError: an option is not acceptable.
        UnavailableError: a package is missing.
        ExportError: the block could not be lowered.
    """
    found = _checked_format(options)
    _lower(found, block, spec, directory, options)


def _lower(
    found: Format, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions
) -> Mapping[str, Any]:
    """Lower a block; what torch raises while it does becomes one sentence."""
    try:
        with without_warnings():  # torch warns of its own workings; what matters is verified
            return found.lower(block, spec, directory, options)
    # A full disk or too little memory is not torch's refusal of the block, and has a sentence of its own.
    except (OSError, MemoryError, DiffDeployError):
        raise
    except Exception as error:
        raise ExportError(f"the block could not be lowered to {options.format}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a long message of torch says: what is violated and the first detail of it, else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Dynamo says what was wrong in a paragraph of this name, before advice to developers.
    for line in lines:
        if line.startswith("Explanation: "):
            return line.removeprefix("Explanation: ")
    # torch.export lists each violated constraint on a line that begins with a dash, under a sentence that says so.
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return f"{lines[0]} {details[0]}" if details else lines[-1]


def _manifest(
    checkpoint: "Checkpoint | ModelCheckpoint",
    spec: GraphSpec,
    options: ExportOptions,
    found: Format,
    recorded: Mapping[str, Any],
) -> Manifest:
    device = found.device_of(options)
    facts = this_machine(device) if found.machine else {}
    manifest = Manifest(
        format=options.format,
        config=checkpoint.config,
        graph=spec,
        options=ExportRecord(
            attention_impl=_impl(found, options, checkpoint.config),
            seed=options.seed,
            # Where the file runs on every device, a device in the manifest would send its users to that one.
            device=device if found.is_bound_to_device else None,
            **recorded,
        ),
        made_for={name: facts[name] for name in found.machine if name in facts},
        verified=False,
        environment=Environment.current(distributions()),
        provenance=provenance_of(checkpoint),
        # Filled in by `write_manifest`, which alone knows what is in the directory.
        files={},
    )
    # Behind the rest, from which it follows.
    return manifest.model_copy(update={"requires": found.least_versions(manifest)})


def provenance_of(checkpoint: "Checkpoint | ModelCheckpoint") -> Provenance:
    """The record of what was read, and how."""
    return Provenance(
        files={file.name: FileDigest(size=file.size, sha256=file.sha256) for file in checkpoint.files},
        layout=checkpoint.layout,
        layer=checkpoint.layer,
        keys=checkpoint.keys,
        options=checkpoint.options.given(),
        defaults=checkpoint.defaults,
    )
