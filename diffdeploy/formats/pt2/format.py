"""``torch.export``: a program that any Python with torch can load, and that checks its own ranges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.config import AnyModel
from diffdeploy.formats.artifact import ArtifactFacts, Backend, Check, FileFault, GraphNode, Intermediates, LayerValues
from diffdeploy.formats.base import Format
from diffdeploy.formats.options import ExportOptions, RunOptions
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["Pt2Format"]


class Pt2Format(Format):
    """A bundle with ``model.pt2``, an exported program."""

    name = "pt2"
    holds_ranges = True
    caches = ("growing", "in-place")

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """See `Format.fastest_impl`."""
        # As in format aoti, except that graphs with a cache use `padded`, too: this format promises two attentions.
        return "padded"

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """See `Format.lower`."""
        from diffdeploy.exporters.pt2 import lower

        lower(block, spec, directory)
        return {}

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """See `Format.open`."""
        from diffdeploy.formats.pt2.backend import Pt2Backend

        return Pt2Backend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """See `Format.facts`."""
        from diffdeploy.formats.pt2.contract import facts

        return facts(bundle)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """See `Format.contract`."""
        from diffdeploy.formats.pt2.contract import checks

        return checks(bundle, weights)

    def intermediates(self, bundle: Bundle) -> Intermediates:
        """See `Format.intermediates`."""
        from diffdeploy.formats.pt2.intermediates import intermediates

        return intermediates(bundle.path, bundle.manifest.graph)

    def nodes(self, bundle: Bundle) -> Sequence[GraphNode]:
        """See `Format.nodes`."""
        from diffdeploy.formats.pt2.nodes import nodes

        return nodes(bundle.path)

    def layer_values(self, bundle: Bundle) -> LayerValues:
        """See `Format.layer_values`."""
        from diffdeploy.formats.pt2.intermediates import layer_values

        return layer_values(bundle.path, len(bundle.manifest.config.blocks), bundle.manifest.graph)

    def read_constants(self, directory: Path, expected: Mapping[str, Array]) -> set[str]:
        """See `Format.read_constants`."""
        from diffdeploy.formats.pt2.constants import read

        return read(directory, expected)

    def write_constants(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """See `Format.write_constants`."""
        from diffdeploy.formats.pt2.constants import write

        write(directory, expected, changes)

    def file_faults(self) -> Sequence[FileFault]:
        """See `Format.file_faults`."""
        from diffdeploy.formats.pt2.faults import PT2_FAULTS

        return PT2_FAULTS
