"""Lowering another block in the way that a bundle was: how the self-test puts faults into the computation."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.bundle import Manifest
from diffdeploy.exporters.base import FORMATS, ExportOptions, lower_block, why_not_export

if TYPE_CHECKING:
    from diffdeploy.modules import AttentionBlock

__all__ = ["lower_again", "why_not_again"]


def why_not_again(manifest: Manifest) -> str | None:
    """Why faults in the computation are not put into bundles of a format; ``None`` when they are."""
    if FORMATS[manifest.format].compiles:
        return f"each takes a compilation; export --format pt2 for the program that {manifest.format} compiles"
    return why_not_export(manifest.format)


def lower_again(block: "AttentionBlock", manifest: Manifest, directory: Path) -> None:
    """Write the artifact of ``block`` into the directory of a bundle, in place of the one there.

    Args:
        block: frozen block in the dtype of the graph.
        manifest: of the bundle: its format, graph and options.
        directory: of a copy of the bundle.

    Raises:
        ExportError: the block could not be lowered.
        UnavailableError: a package or a compiler is missing.
    """
    spec, recorded = manifest.graph, manifest.options
    options = ExportOptions(
        format=manifest.format,
        graph=spec.variant,
        dtype=spec.dtype,
        device="cuda" if recorded.get("device") == "cuda" else "cpu",
        opset=int(recorded["opset"]) if "opset" in recorded else None,
        onnx_flavor="ort" if recorded.get("flavor") == "ort" else None,
        impl=str(recorded["attention_impl"]),
    )
    lower_block(block, spec, directory, options)
