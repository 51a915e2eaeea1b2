"""``torch.compile``: inductor's artifact and its kernels, for a warm start with the same torch and hardware."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import AnyModel
from diffdeploy.formats.artifact import ArtifactFacts, Backend, Check
from diffdeploy.formats.base import Format
from diffdeploy.formats.inductor import IMPLS, fastest_impl
from diffdeploy.formats.options import ExportOptions, RunOptions
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["CompileFormat"]


class CompileFormat(Format):
    """A bundle with ``model.inductor`` and the folder ``kernels``; the weights are arguments of the artifact."""

    name = "compile"
    impls = IMPLS
    compiles = True
    executes = "machine code and pickles"
    # Python's version matters too, since the kernels are extension modules.
    machine = ("torch", "python", "platform", "isa", "gpu")

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """See `Format.fastest_impl`."""
        return fastest_impl(options, config, self.device_of(options))

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """See `Format.lower`."""
        from diffdeploy.exporters.compile import lower

        lower(block, spec, directory, self.device_of(options))
        return {}

    def check_run_options(self, manifest: Manifest, options: RunOptions) -> None:
        """See `Format.check_run_options`; these bundles can be recompiled."""
        # `recompile` is cleared, since the base class rejects it.
        super().check_run_options(manifest, RunOptions(runtime=options.runtime))

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """See `Format.open`."""
        from diffdeploy.formats.compile.backend import CompiledBackend

        return CompiledBackend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """See `Format.facts`."""
        from diffdeploy.formats.compile.contract import facts

        return facts(bundle)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """See `Format.contract`."""
        from diffdeploy.formats.compile.contract import checks

        return checks(bundle, weights)
