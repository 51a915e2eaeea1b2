"""Deployment formats: one class each, in its own folder, and the registry that lists them.

The names below are imported on first use, so that listing the formats loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffdeploy.formats.rows import format_names

if TYPE_CHECKING:
    from diffdeploy.formats.artifact import (
        ArtifactFacts,
        Backend,
        CacheBuffers,
        Check,
        FileFault,
        GraphNode,
        Intermediates,
        LayerValues,
        Product,
        ProductValues,
        TritonBackend,
    )
    from diffdeploy.formats.base import Format
    from diffdeploy.formats.options import Device, ExportOptions, RunOptions, RuntimeName, Selection
    from diffdeploy.formats.registry import (
        Target,
        distributions,
        export_targets,
        find_format,
        formats,
        require_format,
    )

__all__ = [
    "ArtifactFacts",
    "Backend",
    "CacheBuffers",
    "Check",
    "Device",
    "ExportOptions",
    "FileFault",
    "Format",
    "GraphNode",
    "Intermediates",
    "LayerValues",
    "Product",
    "ProductValues",
    "RunOptions",
    "RuntimeName",
    "Selection",
    "Target",
    "TritonBackend",
    "distributions",
    "export_targets",
    "find_format",
    "format_names",
    "formats",
    "require_format",
]

_HOMES = {
    **dict.fromkeys(
        (
            "ArtifactFacts",
            "Backend",
            "CacheBuffers",
            "Check",
            "FileFault",
            "GraphNode",
            "Intermediates",
            "LayerValues",
            "Product",
            "ProductValues",
            "TritonBackend",
        ),
        "artifact",
    ),
    "Format": "base",
    **dict.fromkeys(("Device", "ExportOptions", "RunOptions", "RuntimeName", "Selection"), "options"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'diffdeploy.formats' has no attribute {name!r}")
    return getattr(import_module(f"diffdeploy.formats.{_HOMES.get(name, 'registry')}"), name)
