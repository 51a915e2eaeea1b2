"""AOTInductor: a compiled package for Python or C++ with libtorch; nothing is traced or compiled when it is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffdeploy.bundle import WEIGHTS
from diffdeploy.digests import file_sha256
from diffdeploy.exporters.tracing import check, trace
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AttentionBlock
from diffdeploy.runtime.torch_programs import MODEL

if TYPE_CHECKING:
    from diffdeploy.exporters.base import ExportOptions

__all__ = ["check", "lower"]


def lower(block: AttentionBlock, spec: GraphSpec, directory: Path, options: "ExportOptions") -> dict[str, int | str]:
    """Write ``model.pt2``; `torch._inductor.aoti_load_package` reads it.

    Its metadata carry the digest of the weights and the torch that compiled it.
    """
    metadata = {"weights_sha256": file_sha256(directory / WEIGHTS), "torch": torch.__version__}
    torch._inductor.aoti_compile_and_package(
        trace(block, spec, options.target_device),
        package_path=str(directory / MODEL),
        inductor_configs={"aot_inductor.metadata": metadata},
    )
    return {}
