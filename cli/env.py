"""``diffdeploy env``: what this machine can export, run and verify, and why not the rest."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, get_args

from diffdeploy import __version__
from diffdeploy.cli import console
from diffdeploy.cli.options import AsJson

if TYPE_CHECKING:
    from diffdeploy.graphs import DType

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


def _abilities(format_name: str, device: str, dtype: "DType") -> dict[str, Any]:
    """What can be done with a format on a device in a dtype, and the first reason why something cannot."""
    from diffdeploy.exporters import why_not_export
    from diffdeploy.runtime import why_not_run

    no_export, no_run = why_not_export(format_name, device, dtype), why_not_run(format_name, device, dtype)
    by_reference = format_name == "onnx" and why_not_run(format_name, device, dtype, reference=True) is None
    return {
        "format": format_name,
        "device": device,
        "dtype": dtype,
        "export": no_export is None,
        "run": no_run is None,
        "verify": no_run is None or by_reference,
        "why_not": no_export or no_run,
    }


def _matrix() -> list[dict[str, Any]]:
    from diffdeploy.exporters.base import FORMATS
    from diffdeploy.graphs import DType

    return [
        _abilities(name, device, dtype) for name in FORMATS for device in ("cpu", "cuda") for dtype in get_args(DType)
    ]


def _summary(matrix: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By format, what can be done on some device in some dtype; why not, where something cannot be done at all."""
    verbs = ("export", "run", "verify")
    summary = {}
    for name in dict.fromkeys(row["format"] for row in matrix):
        rows = [row for row in matrix if row["format"] == name]
        able = {verb: any(row[verb] for row in rows) for verb in verbs}
        reason = next((row["why_not"] for row in reversed(rows) if row["why_not"]), None)
        summary[name] = {**able, "why_not": None if all(able.values()) else reason}
    return summary


def _matrix_rows(matrix: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each format, device and answer: the dtypes that share it, what can be done, and why not the rest."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in matrix:
        able = [verb for verb in ("export", "run", "verify") if row[verb]]
        key = (row["format"], row["device"], ", ".join(able) or "nothing", row["why_not"] or "")
        grouped.setdefault(key, []).append(row["dtype"])
    return [(name, device, ", ".join(dtypes), able, why) for (name, device, able, why), dtypes in grouped.items()]


def env(as_json: AsJson = False) -> int:
    """Say what this machine can export, run and verify, and why not the rest."""
    with console.activity("looking around"):
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        threads = torch.get_num_threads()
        matrix = _matrix()
    versions = _versions()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
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
                "formats": _summary(matrix),
                "matrix": matrix,
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
    console.print_table(("format", "device", "dtypes", "can", "why not the rest"), _matrix_rows(matrix))
    return 0
