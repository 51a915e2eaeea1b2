"""``diffdeploy env``: what this machine can export, run and verify, and why not the rest."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from diffdeploy import __version__
from diffdeploy.cli import console

__all__ = ["env"]

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "flash-attn", "safetensors", "numpy")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def env(as_json: Annotated[bool, typer.Option("--json", help="Result as one JSON object.")] = False) -> int:
    """Say what this machine can export, run and verify, and why not the rest."""
    with console.activity("looking around"):
        import torch

        from diffdeploy.exporters import why_not_export
        from diffdeploy.exporters.base import FORMATS
        from diffdeploy.runtime import why_not_run

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        reasons = {name: (why_not_export(name), why_not_run(name)) for name in FORMATS}
        threads = torch.get_num_threads()
    versions = _versions()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    formats = {
        name: {
            "export": no_export is None,
            "run": no_run is None,
            "verify": no_run is None,
            "why_not": no_export or no_run,
        }
        for name, (no_export, no_run) in reasons.items()
    }
    if as_json:
        console.print_json(
            {
                "diffdeploy": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "threads": threads,
                "cuda_device": device,
                "cxx_compiler": compiler,
                "packages": versions,
                "formats": formats,
            }
        )
        return 0
    rows = [
        ("diffdeploy", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {threads} threads"),
        ("cuda", device or "no device that torch can use"),
        ("C++ compiler", compiler or "none found"),
        *((name, found or "not installed") for name, found in versions.items()),
    ]
    console.print_rows(rows)
    console.print_text("")
    for name, able in formats.items():
        verbs = [verb for verb in ("export", "run", "verify") if able[verb]]
        said = f"can {', '.join(verbs)}" if verbs else "cannot be used"
        console.print_text(f"format {name}: {said}" + (f"; {able['why_not']}" if able["why_not"] else ""))
    return 0
