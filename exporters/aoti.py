"""AOTInductor: a compiled package for Python or C++ with libtorch; nothing is traced or compiled when it is loaded."""

from pathlib import Path

import torch

from diffdeploy.bundle import WEIGHTS
from diffdeploy.exporters.tracing import trace
from diffdeploy.files import file_sha256
from diffdeploy.formats.aoti.backend import MODEL
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule

__all__ = ["lower"]


def lower(block: AnyModule, spec: GraphSpec, directory: Path, device: str) -> None:
    """Write ``model.pt2``; `torch._inductor.aoti_load_package` reads it.

    Its metadata carry the digest of the weights and the torch that compiled it.
    """
    # The package holds the weights inside, out of reach; the verification compares this with weights.safetensors.
    metadata = {"weights_sha256": file_sha256(directory / WEIGHTS), "torch": torch.__version__}
    # torch has no public name for it.
    torch._inductor.aoti_compile_and_package(  # noqa: SLF001
        trace(block, spec, device),
        package_path=str(directory / MODEL),
        inductor_configs={"aot_inductor.metadata": metadata},
    )
