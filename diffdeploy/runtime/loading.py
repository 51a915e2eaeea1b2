"""`load`: from a directory to a runtime, with the backend of its format."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from diffdeploy.bundle import Manifest, open_bundle
from diffdeploy.errors import UnavailableError
from diffdeploy.runtime.base import RunOptions, Runtime

__all__ = ["load", "require_runnable", "why_not_run"]


class _Backend(NamedTuple):
    """Where the runtime of a format is, and what it needs that the base installation does not have."""

    module: str
    class_name: str
    package: str
    extra: str


_BACKENDS = {
    "onnx": _Backend("diffdeploy.runtime.onnx", "OnnxRuntime", "onnxruntime", "cpu"),
    "pt2": _Backend("diffdeploy.runtime.torch_programs", "Pt2Runtime", "torch", "cpu"),
    "aoti": _Backend("diffdeploy.runtime.torch_programs", "AotiRuntime", "torch", "cpu"),
}


def why_not_run(format_name: str) -> str | None:
    """Why bundles of a format cannot be run here, found out without loading anything; ``None`` when they can."""
    backend = _BACKENDS.get(format_name)
    if backend is None:
        return f"this version cannot run format {format_name!r}; it runs {', '.join(_BACKENDS)}"
    if find_spec(backend.package) is None:
        return (
            f"{backend.package} is not installed, and {format_name} bundles run on it; "
            f"pip install 'diffdeploy[{backend.extra}]'"
        )
    return None


def require_runnable(manifest: Manifest, options: RunOptions) -> None:
    """Check that a bundle can be run here.

    Raises:
        UnavailableError: this version does not know the format, or its backend is not installed.
    """
    if reason := why_not_run(manifest.format):
        raise UnavailableError(reason)


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
    backend = _BACKENDS[bundle.manifest.format]
    runtime: type[Runtime] = getattr(import_module(backend.module), backend.class_name)
    return runtime(bundle, options)
