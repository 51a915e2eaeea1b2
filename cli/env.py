"""``diffdeploy env``: what this machine can export, run and verify, and what prevents the rest."""

import os
import platform
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from diffdeploy import __version__
from diffdeploy.cli import console
from diffdeploy.cli.progress import activity
from diffdeploy.cli.shared_options import AsJson
from diffdeploy.toolchain import compiler_path

if TYPE_CHECKING:
    from diffdeploy.formats import Device, Format
    from diffdeploy.graphs import DType

__all__ = ["env"]


def _versions() -> dict[str, str | None]:
    """Version of each package that results depend on; ``None`` if it is not installed."""
    from diffdeploy.formats import distributions
    from diffdeploy.versions import installed_versions

    # Not specific to a format: safetensors reads every bundle, and the others convert text for models.
    names = (*distributions(), "safetensors", "tokenizers", "jinja2", "transformers")
    installed = installed_versions(names)
    return {name: installed.get(name) for name in names}


def _abilities(found: "Format", device: "Device", dtype: "DType") -> dict[str, Any]:
    """Abilities of a format on a device in a dtype, and the first reason why something is impossible."""
    no_export, no_run = found.why_not_export(device, dtype), found.why_not_run(device, dtype)
    return {
        "format": found.name,
        "device": device,
        "dtype": dtype,
        "export": no_export is None,
        "run": no_run is None,
        "verify": no_run is None or _can_verify_by_reference(found, device, dtype),
        "why_not": no_export or no_run,
    }


def _can_verify_by_reference(found: "Format", device: "Device", dtype: "DType") -> bool:
    from diffdeploy.errors import InputError
    from diffdeploy.formats import ExportOptions

    try:
        found.check_options(ExportOptions(format=found.name, device=device, dtype=dtype, runtime="reference"))
    except InputError:
        return False
    return found.why_not_run(device, dtype, runtime="reference") is None


def _matrix() -> list[dict[str, Any]]:
    from diffdeploy.formats import Device, formats
    from diffdeploy.graphs import DType

    return [
        _abilities(found, device, dtype)
        for found in formats().values()
        for device in get_args(Device)
        for dtype in get_args(DType)
    ]


def _summary(matrix: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each format can do on at least one device in at least one dtype, and a reason if that is not everything."""
    verbs = ("export", "run", "verify")
    summary = {}
    for name in dict.fromkeys(row["format"] for row in matrix):
        rows = [row for row in matrix if row["format"] == name]
        able = {verb: any(row[verb] for row in rows) for verb in verbs}
        reason = next((row["why_not"] for row in reversed(rows) if row["why_not"]), None)
        summary[name] = {**able, "why_not": None if all(able.values()) else reason}
    return summary


def _matrix_rows(matrix: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per format, device and result: the dtypes with that result, what works, and what prevents the rest."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for row in matrix:
        able = [verb for verb in ("export", "run", "verify") if row[verb]]
        key = (row["format"], row["device"], ", ".join(able) or "nothing", row["why_not"] or "")
        # One line per format, device and dtype would be dozens of lines, most of them the same.
        grouped.setdefault(key, []).append(row["dtype"])
    return [(name, device, ", ".join(dtypes), able, why) for (name, device, able, why), dtypes in grouped.items()]


def _torch() -> tuple[int | None, str | None]:
    """Threads that torch uses, and its CUDA device; ``None`` without torch, or without a device."""
    # A runtime for ONNX alone needs no torch.
    if find_spec("torch") is None:
        return None, None
    import torch

    return torch.get_num_threads(), torch.cuda.get_device_name() if torch.cuda.is_available() else None


def env(as_json: AsJson = False) -> int:
    """Show what this machine can export, run and verify, and what prevents the rest."""
    with activity("examining this machine", stages=False):
        threads, device = _torch()
        matrix = _matrix()
    versions = _versions()
    compiler = compiler_path()
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
        (
            "cpu",
            f"{platform.machine()}, {os.cpu_count()} cores, "
            + ("torch is not installed" if threads is None else f"torch uses {threads} threads"),
        ),
        ("cuda", device or "no device that torch can use"),
        ("C++ compiler", compiler or "none found"),
        *((name, found or "not installed") for name, found in versions.items()),
    ]
    console.print_rows(rows)
    console.print_text("")
    console.print_table(("format", "device", "dtypes", "can", "what prevents the rest"), _matrix_rows(matrix))
    return 0
