"""AOTInductor: a compiled package for Python or C++ with libtorch; nothing is traced or compiled when it is loaded."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from diffdeploy.bundle import WEIGHTS
from diffdeploy.errors import ExportError
from diffdeploy.exclusive import replaced
from diffdeploy.exporters.tracing import trace
from diffdeploy.files import file_sha256
from diffdeploy.formats.aoti.backend import MODEL
from diffdeploy.formats.aoti.constants import read_library
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule
from diffdeploy.toolchain import compiler

__all__ = ["lower", "scratch_for_all_programs"]


def lower(block: AnyModule, spec: GraphSpec, directory: Path, device: str) -> None:
    """Write ``model.pt2``; `torch._inductor.aoti_load_package` reads it.

    Its metadata contains the digest of the weights and the version of torch that compiled it.

    Raises:
        ExportError: the compiler made a package that crashes when it is loaded.
    """
    # The weights in the package cannot be read back; the verification compares this digest with weights.safetensors.
    metadata = {"weights_sha256": file_sha256(directory / WEIGHTS), "torch": torch.__version__}
    program = trace(block, spec, device)
    with scratch_for_all_programs(), nullcontext() if device == "cpu" else _without_vector_instructions():
        # torch has no public name for this function.
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001
            program, package_path=str(directory / MODEL), inductor_configs={"aot_inductor.metadata": metadata}
        )

    _require_shared_cpp_library(directory / MODEL)


@contextmanager
def _without_vector_instructions() -> Iterator[None]:
    """Use no vector instructions in code that only launches kernels, so that any processor of its architecture runs it.

    To detect vector instructions, inductor starts Python with torch once for each kind: ten times on a processor with
    AVX-512 and AMX, which took 40 of the 68 seconds of an export.
    """
    from torch._inductor import codecache, cpu_vec_isa

    def pick_none() -> cpu_vec_isa.VecISA:
        return cpu_vec_isa.invalid_vec_isa

    with replaced(codecache, "pick_vec_isa", pick_none), replaced(cpu_vec_isa, "pick_vec_isa", pick_none):
        yield


def _require_shared_cpp_library(package: Path) -> None:
    """Refuse a package with its own copy of the C++ library: `std::regex` would mix it with torch's copy, and crash.

    Raises:
        ExportError: the package contains such a copy.
    """
    _, library = read_library(package)
    # Names of shared libraries, as the linker writes them: either one is enough, that of GCC or that of clang.
    if b"libstdc++.so.6" in library or b"libc++.so.1" in library:
        return
    raise ExportError(
        f"{compiler()} links libstdc++ statically, and such a package crashes when it is loaded; "
        "set CXX to a compiler that does not, such as the g++ of your distribution"
    )


@contextmanager
def scratch_for_all_programs() -> Iterator[None]:
    """Make packages allocate memory for the tensor maps of a Triton kernel separately for each of its programs.

    Torch 2.11 allocates it only once, so programs overwrite each other's tensor maps; 2.14 multiplies its size by the
    grid, as is done here.
    """
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    define = CUDADeviceOpOverrides.cpp_scratch

    def define_for_all(*arguments: Any, **named: Any) -> tuple[list[str], str] | None:
        defined = define(*arguments, **named)
        if defined is None:
            return None
        lines, name = defined
        size = re.compile(r"(_size\[\] = \{)(\d+)(\};)")
        return [size.sub(r"\g<1>int64_t{\2} * grid_0 * grid_1 * grid_2\3", line) for line in lines], name

    with replaced(CUDADeviceOpOverrides, "cpp_scratch", define_for_all):
        yield
