"""FlashAttention-2: weights and config, for the eager block on CUDA with the package flash-attn."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.config import AnyModel
from diffdeploy.errors import InputError
from diffdeploy.formats.artifact import ArtifactFacts, Backend, Check
from diffdeploy.formats.base import Format
from diffdeploy.formats.options import ExportOptions, RunOptions
from diffdeploy.graphs import DType, GraphSpec

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["Flash2Format"]


class Flash2Format(Format):
    """A bundle without a graph: only weights and config are needed, which every bundle has."""

    name = "flash2"
    impls = ("flash2",)
    package = "flash_attn"
    distributions = ("flash-attn",)
    devices = ("cuda",)
    # FlashAttention-2 has kernels for these two dtypes only, and only on CUDA.
    dtypes = ("float16", "bfloat16")
    runs: ClassVar[Mapping[str, tuple[DType, ...]]] = {"cuda": ("float16", "bfloat16")}

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """See `Format.fastest_impl`."""
        return "flash2"

    def check_options(self, options: ExportOptions) -> None:
        """Reject whole models, and options that the format does not have.

        Raises:
            InputError: a whole model or an option of another format was given.
        """
        super().check_options(options)
        if options.graph == "model":
            raise InputError("format flash2 is for blocks, but this is a whole model; give --layer, or another format")

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """See `Format.lower`."""
        return {}

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """See `Format.open`."""
        from diffdeploy.formats.flash2.backend import Flash2Backend

        return Flash2Backend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """See `Format.facts`."""
        from diffdeploy.formats.flash2.contract import facts

        return facts(bundle)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """See `Format.contract`."""
        from diffdeploy.formats.flash2.contract import checks

        return checks(bundle, weights)
