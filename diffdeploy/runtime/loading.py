"""`load`: from a directory to a runtime, with the backend of its format; and what can be run here."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from diffdeploy.bundle import Manifest, open_bundle
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.graphs import DType
from diffdeploy.runtime.base import RunOptions, Runtime
from diffdeploy.runtime.machine import differences, this_machine

__all__ = ["RUNNABLE_FORMATS", "device_of", "load", "require_runnable", "why_not_run"]

_ALL: tuple[DType, ...] = ("float32", "float16", "bfloat16")
_HALF: tuple[DType, ...] = ("float16", "bfloat16")


class _Backend(NamedTuple):
    """Where the runtime of a format is, the package it runs on, and the dtypes that it has by kind of device."""

    module: str
    class_name: str
    package: str
    dtypes: dict[str, tuple[DType, ...]]


_BACKENDS = {
    "onnx": _Backend(
        "diffdeploy.runtime.onnx", "OnnxRuntime", "onnxruntime", {"cpu": ("float32", "float16"), "cuda": _ALL}
    ),
    "pt2": _Backend("diffdeploy.runtime.torch_programs", "Pt2Runtime", "torch", {"cpu": _ALL, "cuda": _ALL}),
    "aoti": _Backend("diffdeploy.runtime.torch_programs", "AotiRuntime", "torch", {"cpu": _ALL, "cuda": _ALL}),
    "compile": _Backend("diffdeploy.runtime.compiled", "CompiledRuntime", "torch", {"cpu": _ALL, "cuda": _ALL}),
    "flash2": _Backend("diffdeploy.runtime.flash2", "Flash2Runtime", "flash_attn", {"cuda": _HALF}),
}
_ON_CUDA = {"onnx": _BACKENDS["onnx"]._replace(class_name="OnnxCudaRuntime")}
_REFERENCE = _Backend("diffdeploy.runtime.onnx", "OnnxReference", "onnx", {"cpu": _ALL})
RUNNABLE_FORMATS = tuple(_BACKENDS)


def device_of(manifest: Manifest, options: RunOptions) -> str:
    """Where a bundle is run: as asked for, else where it was made for, else on the CPU.

    Raises:
        InputError: not the name of a device, or not the kind of device that the artifact was compiled for.
    """
    made_for = manifest.options.get("device")
    device = options.device or str(made_for or "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device is {device!r}; accepted is cpu, cuda or cuda:N")
    if made_for is not None and device.split(":")[0] != made_for and not options.recompile:
        raise InputError(
            f"device is {device}, but this {manifest.format} bundle was made for {made_for}; export another"
        )
    return device


def why_not_run(
    format_name: str, device: str = "cpu", dtype: DType = "float32", *, reference: bool = False
) -> str | None:
    """Why bundles of a format cannot be run here; ``None`` when they can.

    Args:
        format_name: of the bundle.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of its graph.
        reference: with `onnx.reference` in place of onnxruntime.
    """
    if format_name not in _BACKENDS:
        return f"this version cannot run format {format_name!r}; it runs {', '.join(_BACKENDS)}"
    backend, kind = _REFERENCE if reference else _BACKENDS[format_name], device.split(":")[0]
    if kind not in backend.dtypes:
        return f"{format_name} bundles run on {' or '.join(backend.dtypes)}, not on {kind}"
    if kind != "cpu" and (reason := _why_no_cuda(device)):
        return reason
    if find_spec(backend.package) is None:
        extra = "cpu" if kind == "cpu" else "gpu"
        return (
            f"{backend.package} is not installed, and {format_name} bundles run on it; "
            f"pip install 'diffdeploy[{extra}]'"
        )
    if dtype not in backend.dtypes[kind]:
        return f"{backend.package} has no {dtype} attention on {kind}" + (
            "; --runtime reference verifies such graphs, slowly" if format_name == "onnx" else ""
        )
    return _why_no_provider() if kind != "cpu" and backend.package == "onnxruntime" else None


def _why_no_cuda(device: str) -> str | None:
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        return f"device {device} needs a GPU that torch {torch.__version__} can use, and there is none"
    if index >= torch.cuda.device_count():
        return f"device {device} does not exist; this machine has {torch.cuda.device_count()}"
    return None


def _why_no_provider() -> str | None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} has no CUDA provider; pip install 'diffdeploy[gpu]'"


def require_runnable(manifest: Manifest, options: RunOptions) -> None:
    """Check that a bundle can be run here.

    Raises:
        InputError: an option that the format does not have.
        UnavailableError: this version does not know the format, its backend or device is not here, or the artifact was
            compiled for another machine.
    """
    if options.reference and (manifest.format != "onnx" or manifest.options.get("flavor") == "ort"):
        raise InputError("the reference runtime interprets standard ONNX operators, and this bundle does not have them")
    if options.recompile and manifest.format != "compile":
        raise InputError(f"format {manifest.format} cannot be compiled afresh; export it again on this machine")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; accepted is 1 or more")
    device = device_of(manifest, options)
    if reason := why_not_run(manifest.format, device, manifest.graph.dtype, reference=options.reference):
        raise UnavailableError(reason)
    if not manifest.made_for or options.recompile:
        return
    if found := differences(manifest.made_for, this_machine(device)):
        way_out = "--recompile compiles it afresh here" if manifest.format == "compile" else "export it again here"
        raise UnavailableError(f"this {manifest.format} bundle was compiled for {'; '.join(found)}; {way_out}")


def load(
    path: str | Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    reference: bool = False,
    recompile: bool = False,
) -> Runtime:
    """Open a bundle for running; its digests are checked first.

    Args:
        path: the bundle's directory.
        device: see `RunOptions`, as for the other options.
        threads: of the backend.
        reference: run ONNX with `onnx.reference`.
        recompile: compile afresh.

    Raises:
        InputError: no bundle there, or an option that it does not have.
        IntegrityError: the bundle is not what was exported.
        UnavailableError: the backend or the device is not here, or the bundle was made for another machine.
        ExportError: the backend cannot load the artifact.
    """
    options = RunOptions(device=device, threads=threads, reference=reference, recompile=recompile)
    bundle = open_bundle(path)
    require_runnable(bundle.manifest, options)
    device, backend = device_of(bundle.manifest, options), _BACKENDS[bundle.manifest.format]
    if reference:
        backend = _REFERENCE
    elif device != "cpu":
        backend = _ON_CUDA.get(bundle.manifest.format, backend)
    runtime: type[Runtime] = getattr(import_module(backend.module), backend.class_name)
    return runtime(bundle, options, device)
