"""The steps of an export: checkpoint, cast weights, lowered artifact, verification, then one rename into place."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
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
from diffdeploy.exporters.memory import require_memory
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

# Longest sequence if neither the user nor the checkpoint states it.
_MAX_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: directory of the bundle.
        facts: facts read from the artifact.
        report: report of the verification that accepted it, if there was one.
        loss: loss from quantised weights, if it was measured.
    """

    path: Path
    facts: ArtifactFacts
    report: Report | None
    loss: Loss | None = None


def _checked_format(options: ExportOptions) -> Format:
    """Format of an export, after the checks that need no weights."""
    found = require_format(options.format)
    device = found.device_of(options)
    # Errors that occur on every machine come first: the user can correct those, unlike what this machine lacks.
    if reason := found.why_not_made_for(device, options.dtype):
        raise InputError(reason)
    if reason := found.why_not_export(device, options.dtype):
        raise UnavailableError(reason)
    # Checked here and not by the operator, since an implementation may exist without being one that this format ships.
    if options.impl not in ("auto", *found.impls):
        raise InputError(
            f"attention implementation {str(options.impl)!r} is not available in format {options.format}; "
            f"accepted: {', '.join(('auto', *found.impls))}"
        )
    if options.cache not in found.caches:
        raise InputError(
            f"cache is {options.cache}, which format {options.format} does not have; accepted: "
            f"{', '.join(found.caches)}"
        )
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}; accepted: 0 or more")
    found.check_options(options)
    return found


def settled_length(options: ExportOptions, checkpoint: "Checkpoint | ModelCheckpoint") -> tuple[int, str | None]:
    """The longest sequence, and an explanation if the default is less than what the checkpoint states.

    By default, it is ``max_position_embeddings`` of ``config.json``, limited to what a verification can handle, or 2048
    if the checkpoint does not state it.
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
            f"max_position_embeddings is {said}, more than a verification can handle in memory; the longest sequence "
            f"is {taken}; --max-sequence-length overrides it"
        )
    return taken, reason


def _impl(found: Format, options: ExportOptions, config: AnyModel) -> str:
    return found.fastest_impl(options, config) if options.impl == "auto" else str(options.impl)


def _write_weights(
    config: AnyModel, weights: ShippedWeights, spec: GraphSpec, options: ExportOptions, staging: Path
) -> None:
    import safetensors.numpy

    computed = {name: to_array(tensor) for name, tensor in weights.computed.items()}
    # Golden vectors use the cast and quantised weights: the artifact must compute with the weights that it was given,
    # not with those of the checkpoint. Both files are serialised in memory, since the file writer of safetensors hides
    # the reason when a disk is full.
    (staging / WEIGHTS).write_bytes(safetensors.numpy.save(dict(weights.stored)))
    golden = golden_arrays(config, spec, computed, options.seed, options.quantisation)
    (staging / GOLDEN).write_bytes(safetensors.numpy.save(golden))


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
    """Lower a block or model, verify the artifact, and move the bundle to ``output``; a failure leaves nothing there.

    Args:
        checkpoint: the block or the model, from `diffdeploy.read_checkpoint` or `diffdeploy.read_model`.
        output: directory of the bundle, which is created along with its parents.
        options: options for the artifact.
        force: true to replace a bundle at ``output``.
        verify: true to run the verification; otherwise the manifest says that the bundle is not verified.
        phase: callback that receives a few words when a phase of the export begins.
        progress: callback that receives the number of cases done, the total number, and the name of the next case.

    Raises:
        InputError: an option, a weight or ``output`` is not acceptable.
        UnavailableError: a package or disk space is missing.
        ExportError: the block could not be lowered.
        RejectedError: the artifact does not compute what its weights and config define.
        VerificationError: the loss from quantised weights exceeds the limits in ``options``.
    """
    import torch

    options = options or ExportOptions()
    check_quantisation(checkpoint, options)
    checkpoint = to_quantise(checkpoint, options)
    max_sequence_length, _ = settled_length(options, checkpoint)
    found = _checked_format(options)
    require_memory(checkpoint.config, options.dtype)
    device = found.device_of(options)
    # Checked before lowering, which takes minutes if it compiles.
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
        cache=options.cache,
    )
    weights = ShippedWeights.of(checkpoint, options)
    report = None
    with staged_bundle(output, force=force) as staging:
        phase("lowering")
        # Written before lowering, since aoti writes the digest of this file into its package.
        _write_weights(checkpoint.config, weights, spec, options, staging)
        for companion in checkpoint.companions:
            shutil.copyfile(companion, staging / companion.name)
        length, dtype = spec.axes["sequence_length"].max, getattr(torch, spec.dtype)
        impl = _impl(found, options, checkpoint.config)
        block = frozen_module(checkpoint.config, weights.computed, impl=impl, max_positions=length, dtype=dtype)
        recorded = _lower(found, block, spec, staging, options)
        manifest = _manifest(checkpoint, spec, options, found, recorded)
        for name, content in found.engine_files(manifest, staging).items():
            (staging / name).write_bytes(content)
        # The manifest says that the bundle is not verified, and the verification opens the directory as any user would.
        manifest = write_manifest(staging, manifest)
        # Read even without verification, since the command line reports the facts.
        facts = artifact_facts(Bundle(staging, manifest))
        if options.weights is not None:
            phase("measuring the loss")
        loss = loss_of(Bundle(staging, manifest), weights, options, progress)
        if verify:
            phase("verifying")
            # The export is recorded only once it is complete, so this process trusts it explicitly.
            run_options = RunOptions(device=device, runtime=options.runtime, trust=True)
            report = _accept(Bundle(staging, manifest), run_options, options.cases, progress, loss)
    remember_export(output)
    return Export(output, facts, report, loss)


def _accept(
    bundle: Bundle, run_options: RunOptions, cases: Selection, progress: Progress | None, loss: Loss | None
) -> Report:
    """Verify a bundle and mark it as verified; the loss is recorded next to the verdict.

    Raises:
        RejectedError: the verification failed.
    """
    report = verify_bundle(bundle.path, cases=cases, progress=progress, run_options=run_options)
    report = report.model_copy(update={"loss": loss})
    if not report.passed:
        raise RejectedError(
            f"the exported {bundle.manifest.format} artifact failed verification and was not kept: "
            f"{report.first_failure()}; --no-verify keeps the artifact, for diffdeploy verify to examine",
            report,
        )
    # The report needs a digest, too, so the manifest is written again.
    (bundle.path / REPORT).write_bytes(report.to_bytes())
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"verified": True}))
    return report


def lower_block(block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> None:
    """Write the artifact of a block, and nothing else, into a directory that contains its weights.

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
    """Lower a block, and turn errors of torch into one sentence."""
    try:
        # torch warns about its own internals; the artifact is verified anyway.
        with without_warnings(), _without_fake_tensor_cache():
            return found.lower(block, spec, directory, options)
    # A full disk or a lack of memory is not torch's rejection of the block, and has its own message.
    except (OSError, MemoryError, DiffDeployError):
        raise
    except Exception as error:
        raise ExportError(f"the block could not be lowered to {options.format}: {_reason(error)}") from error


def _without_fake_tensor_cache() -> AbstractContextManager[Any]:
    """Trace without torch's cache of operators' results.

    With symbolic sizes, a lookup takes longer than computing the result anew: without the cache, lowering a block to
    ONNX takes 0.75 of the time, and to ``torch.export`` 0.56 (torch 2.13, one thread). The artifact is the same.
    """
    from torch._dynamo import config

    without: AbstractContextManager[Any] = config.patch(fake_tensor_cache_enabled=False)
    return without


def _reason(error: Exception) -> str:
    """Shorten an error message of torch to the violation and its first detail, or to its last line if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Dynamo describes the error in a paragraph with this heading, before advice to developers.
    for line in lines:
        if line.startswith("Explanation: "):
            return line.removeprefix("Explanation: ")
    # torch.export lists each violated constraint on a line that begins with a dash, below a heading.
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
            # If the file runs on every device, a device in the manifest would restrict its users to that one.
            device=device if found.is_bound_to_device else None,
            **recorded,
        ),
        made_for={name: facts[name] for name in found.machine if name in facts},
        verified=False,
        environment=Environment.current(distributions()),
        provenance=provenance_of(checkpoint),
        # `write_manifest` adds the files, since only it knows the content of the directory.
        files={},
    )
    # Computed last, since it depends on the rest of the manifest.
    return manifest.model_copy(update={"requires": found.least_versions(manifest)})


def provenance_of(checkpoint: "Checkpoint | ModelCheckpoint") -> Provenance:
    """Record of the files that were read, and of the options for reading them."""
    return Provenance(
        files={file.name: FileDigest(size=file.size, sha256=file.sha256) for file in checkpoint.files},
        layout=checkpoint.layout,
        layer=checkpoint.layer,
        keys=checkpoint.keys,
        options=checkpoint.options.given(),
        defaults=checkpoint.defaults,
    )
