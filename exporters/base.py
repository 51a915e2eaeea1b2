"""The life of an export: checkpoint, cast weights, lowered artifact, verification, then one rename into place."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from diffdeploy.arrays import to_array
from diffdeploy.bundle import (
    GOLDEN,
    REPORT,
    WEIGHTS,
    Bundle,
    Environment,
    FileDigest,
    Manifest,
    Provenance,
    staged_bundle,
    write_manifest,
)
from diffdeploy.config import LAMBDA_VECTORS, AnyConfig
from diffdeploy.errors import DiffDeployError, ExportError, InputError, UnavailableError
from diffdeploy.graphs import DType, GraphSpec, Variant, graph_spec
from diffdeploy.ops import Impl, resolve_impl
from diffdeploy.runtime import RunOptions, why_not_run
from diffdeploy.runtime.machine import this_machine
from diffdeploy.verify import GraphFacts, Progress, RejectedError, Report, contracts, golden_arrays, verify_bundle

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.checkpoints import Checkpoint
    from diffdeploy.modules import AttentionBlock

__all__ = ["FORMATS", "Export", "ExportOptions", "export_bundle", "lower_block", "why_not_export"]


class Format(NamedTuple):
    """A row of the table of formats.

    Attributes:
        module: the module that lowers.
        packages: what it needs beside torch.
        impls: implementations that it can ship.
        devices: kinds of device that it is made for.
        dtypes: of its graphs.
        compiles: whether it makes machine code, for one kind of device, and with a C++ compiler.
        machine: what of `this_machine` that code depends on.
    """

    module: str
    packages: tuple[str, ...] = ()
    impls: tuple[Impl, ...] = (Impl.TWO_CALL, Impl.PADDED)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[DType, ...] = ("float32", "float16", "bfloat16")
    compiles: bool = False
    machine: tuple[str, ...] = ()


_COMPILED = (Impl.TWO_CALL, Impl.PADDED, Impl.PAIRED, Impl.ROWS)

FORMATS = {
    "onnx": Format("diffdeploy.exporters.onnx", ("onnx", "onnxscript")),
    "pt2": Format("diffdeploy.exporters.pt2"),
    "aoti": Format(
        "diffdeploy.exporters.aoti", impls=_COMPILED, compiles=True, machine=("torch", "platform", "isa", "gpu")
    ),
    "compile": Format(
        "diffdeploy.exporters.compile",
        impls=_COMPILED,
        compiles=True,
        machine=("torch", "python", "platform", "isa", "gpu"),
    ),
    "flash2": Format(
        "diffdeploy.exporters.flash2", impls=(Impl.FLASH2,), devices=("cuda",), dtypes=("float16", "bfloat16")
    ),
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user can choose about the artifact.

    Attributes:
        format: one of `FORMATS`.
        graph: variant of the graph, see `GraphSpec`.
        dtype: of the graph and its weights.
        max_batch_size: largest batch the artifact is declared for.
        max_sequence_length: longest sequence the artifact is declared for.
        device: ``cpu`` or ``cuda``: what the formats with machine code are compiled for, and where the artifact is
            verified; by default the first that the format is made for.
        opset: ONNX operator set, 18 to 24; by default 23.
        onnx_flavor: ``standard`` for operators of the standard alone; ``ort`` for those that onnxruntime runs fastest.
        impl: how the two attentions are written down.
        seed: of the inputs that the artifact is verified with.
        reference: verify ONNX with `onnx.reference` in place of onnxruntime.
    """

    format: str = "onnx"
    graph: Variant = "plain"
    dtype: DType = "float32"
    max_batch_size: int = 32
    max_sequence_length: int = 2048
    device: Literal["cpu", "cuda"] | None = None
    opset: int | None = None
    onnx_flavor: Literal["standard", "ort"] | None = None
    impl: Impl | str = Impl.AUTO
    seed: int = 0
    reference: bool = False

    @property
    def target_device(self) -> str:
        """`device`, or the first one that the format is made for."""
        return self.device or FORMATS[self.format].devices[0]


@dataclass(frozen=True)
class Export:
    """A finished export: where the bundle is, what the artifact says of itself, and the report that accepted it."""

    path: Path
    graph: GraphFacts
    report: Report | None


class _Exporter(Protocol):
    def check(self, options: ExportOptions) -> None: ...

    def lower(
        self, block: "AttentionBlock", spec: GraphSpec, directory: Path, options: ExportOptions
    ) -> dict[str, int | str]: ...


def why_not_export(format_name: str, device: str = "cpu", dtype: DType = "float32") -> str | None:
    """Why a format cannot be exported here for a kind of device; ``None`` when it can."""
    row = FORMATS[format_name]
    if dtype not in row.dtypes:
        return f"format {format_name} has no {dtype} kernels; accepted is {' or '.join(row.dtypes)}"
    if device not in row.devices:
        return f"format {format_name} is made for {' or '.join(row.devices)}, not for {device}"
    if missing := [name for name in row.packages if find_spec(name) is None]:
        return f"format {format_name} needs {' and '.join(missing)}, which is not installed"
    compiler = os.environ.get("CXX", "g++")
    if row.compiles and shutil.which(compiler) is None:
        return f"format {format_name} compiles C++, and {compiler} is not found; install it or set CXX"
    if row.compiles and device != "cpu":
        import torch

        if not torch.cuda.is_available():
            return f"format {format_name} compiles for the GPU of this machine, and torch finds none"
    return None


def _exporter(options: ExportOptions) -> _Exporter:
    """The module of a format, after the checks that need no weights."""
    row = FORMATS.get(options.format)
    if row is None:
        raise InputError(f"format is {options.format!r}; accepted: {', '.join(FORMATS)}")
    if options.dtype not in row.dtypes or options.target_device not in row.devices:
        raise InputError(str(why_not_export(options.format, options.target_device, options.dtype)))
    if reason := why_not_export(options.format, options.target_device, options.dtype):
        raise UnavailableError(reason)
    impl = resolve_impl(options.impl, target=options.format, graph=options.graph)
    if impl not in row.impls:
        raise InputError(
            f"attention implementation {impl.value!r} is not what format {options.format} ships; "
            f"accepted: {', '.join(('auto', *row.impls))}"
        )
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}; accepted is 0 or more")
    exporter: Any = import_module(row.module)
    exporter.check(options)
    return exporter  # type: ignore[no-any-return]  # a module stands for the protocol


def cast_weights(checkpoint: "Checkpoint", dtype: DType) -> dict[str, "Tensor"]:
    """Weights as the artifact holds them; the lambda vectors stay fp32, as in the block."""
    import torch

    cast = {}
    for name, tensor in checkpoint.weights.items():
        target = torch.float32 if name in LAMBDA_VECTORS else getattr(torch, dtype)
        cast[name] = tensor.to(target).contiguous()
        if not bool(torch.isfinite(cast[name]).all()):
            raise InputError(
                f"{name} holds values up to {tensor.abs().max().item():.3g}, too large for {target}; "
                "export with --dtype float32"
            )
    return cast


def _write_weights(config: AnyConfig, weights: dict[str, "Tensor"], spec: GraphSpec, seed: int, staging: Path) -> None:
    import numpy as np
    import safetensors.numpy

    arrays = {name: to_array(tensor) for name, tensor in weights.items()}
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    # Serialised first: the library's own file writer hides the reason when a disk is full.
    (staging / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
    (staging / GOLDEN).write_bytes(safetensors.numpy.save(golden_arrays(config, spec, exact, seed)))


def export_bundle(
    checkpoint: "Checkpoint",
    output: Path,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    verify: bool = True,
    stage: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Export:
    """Lower a block, verify the artifact and put the bundle at ``output``; whatever fails leaves nothing there.

    Args:
        checkpoint: the block, from `diffdeploy.read_checkpoint`.
        output: directory of the bundle; made with its parents.
        options: what to make.
        force: replace a bundle that is at ``output``.
        verify: run the verification; without it the manifest says that the bundle is not verified.
        stage: called with a few words when a stage begins.
        progress: called with cases done, cases in all, and the name of the next one.

    Raises:
        InputError: an option, a weight or ``output`` is not acceptable.
        UnavailableError: a package or disk space is missing.
        ExportError: the block could not be lowered.
        RejectedError: the artifact does not compute what its weights and config say.
    """
    options = options or ExportOptions()
    exporter = _exporter(options)
    run_options = RunOptions(device=options.target_device, reference=options.reference)
    if verify and (reason := _why_not_verify(options)):
        raise UnavailableError(f"{reason}; --no-verify exports without running it")
    spec = graph_spec(
        options.graph,
        checkpoint.config,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size,
        max_sequence_length=options.max_sequence_length,
    )
    weights = cast_weights(checkpoint, options.dtype)
    report = None
    with staged_bundle(output, force=force) as staging:
        stage("lowering")
        _write_weights(checkpoint.config, weights, spec, options.seed, staging)
        recorded = _lower(exporter, _block(checkpoint, weights, options), spec, staging, options)
        manifest = write_manifest(staging, _manifest(checkpoint, spec, options, recorded))
        graph = contracts.facts(Bundle(staging, manifest))
        if verify:
            stage("verifying")
            report = verify_bundle(staging, progress=progress, run_options=run_options)
            if not report.passed:
                raise RejectedError(
                    f"the exported {options.format} artifact failed verification and was not kept: "
                    f"{report.first_failure()}; --no-verify keeps one, for diffdeploy verify to look into",
                    report,
                )
            (staging / REPORT).write_bytes(report.to_bytes())
            write_manifest(staging, manifest.model_copy(update={"verified": True}))
    return Export(output, graph, report)


def _why_not_verify(options: ExportOptions) -> str | None:
    return why_not_run(options.format, options.target_device, options.dtype, reference=options.reference)


def lower_block(block: "AttentionBlock", spec: GraphSpec, directory: Path, options: ExportOptions) -> None:
    """Write the artifact of a block into a directory that holds its weights, and nothing else.

    Raises:
        InputError: an option is not acceptable.
        UnavailableError: a package is missing.
        ExportError: the block could not be lowered.
    """
    exporter = _exporter(options)
    moved = block.to(options.target_device) if FORMATS[options.format].compiles else block
    _lower(exporter, moved, spec, directory, options)


def _lower(
    exporter: _Exporter, block: "AttentionBlock", spec: GraphSpec, directory: Path, options: ExportOptions
) -> dict[str, int | str]:
    """Lower a block; what torch raises while it does becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own workings; what matters is verified
            return exporter.lower(block, spec, directory, options)
    except (OSError, MemoryError, DiffDeployError):
        raise
    except Exception as error:
        raise ExportError(f"the block could not be lowered to {options.format}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a long message of torch says: what is violated and the first detail of it, else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return f"{lines[0]} {details[0]}" if details else lines[-1]


def _block(checkpoint: "Checkpoint", weights: dict[str, "Tensor"], options: ExportOptions) -> "AttentionBlock":
    import torch

    from diffdeploy.modules import block_class

    return block_class(checkpoint.config).from_weights(
        checkpoint.config,
        weights,
        impl=resolve_impl(options.impl, target=options.format, graph=options.graph),
        max_positions=options.max_sequence_length,
        dtype=getattr(torch, options.dtype),
    )


def _manifest(
    checkpoint: "Checkpoint", spec: GraphSpec, options: ExportOptions, recorded: dict[str, int | str]
) -> Manifest:
    impl, row = resolve_impl(options.impl, target=options.format, graph=options.graph), FORMATS[options.format]
    bound = {"device": options.target_device} if row.compiles or row.devices == ("cuda",) else {}
    machine = this_machine(options.target_device) if row.compiles else {}
    return Manifest(
        format=options.format,
        config=checkpoint.config,
        graph=spec,
        options={"attention_impl": impl.value, "seed": options.seed, **bound, **recorded},
        made_for={name: fact for name, fact in machine.items() if name in row.machine},
        verified=False,
        environment=Environment.current(),
        provenance=Provenance(
            files={file.name: FileDigest(size=file.size, sha256=file.sha256) for file in checkpoint.files},
            layout=checkpoint.layout,
            layer=checkpoint.layer,
            keys=checkpoint.keys,
            options=checkpoint.options.given(),
        ),
        files={},
    )
