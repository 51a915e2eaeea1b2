"""AOTInductor: a compiled package for Python or C++ with libtorch; nothing is traced or compiled when it is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.config import AnyModel
from diffdeploy.formats.artifact import ArtifactFacts, Backend, Check, FileFault, TritonBackend
from diffdeploy.formats.base import Format
from diffdeploy.formats.inductor import IMPLS, fastest_impl
from diffdeploy.formats.options import ExportOptions, RunOptions
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["AotiFormat"]


class AotiFormat(Format):
    """``model.pt2``: a package of machine code with its weights in it."""

    name = "aoti"
    impls = IMPLS
    compiles = True
    caches = ("growing", "in-place")
    executes = "machine code"
    # Python's version does not matter, since libtorch loads a package, from C++ as well.
    machine = ("torch", "platform", "isa", "gpu")
    # According to its backend's README (May 2026, Triton 26.05), Triton does not batch requests along the first axis,
    # and names tensors by position.
    triton = TritonBackend(
        platform="torch_aoti", backend="pytorch", files=("model.pt2",), batches=False, by_position=True
    )

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """See `Format.fastest_impl`."""
        return fastest_impl(options, config, self.device_of(options))

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """See `Format.lower`."""
        from diffdeploy.exporters.aoti import lower

        lower(block, spec, directory, self.device_of(options))
        return {}

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """See `Format.open`."""
        from diffdeploy.formats.aoti.backend import AotiBackend

        return AotiBackend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """See `Format.facts`."""
        from diffdeploy.formats.aoti.contract import facts

        return facts(bundle)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """See `Format.contract`."""
        from diffdeploy.formats.aoti.contract import checks

        return checks(bundle, weights)

    def read_constants(self, directory: Path, expected: Mapping[str, Array]) -> set[str]:
        """See `Format.read_constants`."""
        from diffdeploy.formats.aoti.constants import read

        return read(directory, expected)

    def write_constants(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """See `Format.write_constants`."""
        from diffdeploy.formats.aoti.constants import write

        write(directory, expected, changes)

    def file_faults(self) -> Sequence[FileFault]:
        """See `Format.file_faults`."""
        from diffdeploy.formats.aoti.faults import AOTI_FAULTS

        return AOTI_FAULTS
