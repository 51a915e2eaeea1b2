"""Inductor's C++ kernels as files of a bundle, found by the digest of their source.

Inductor finds its kernels by a hash of the compiler's command line, which contains the installation path of torch, and
compiles again if that path differs. A bundle must start warm wherever the same torch is installed, without a compiler.
"""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffdeploy.exclusive import replaced

__all__ = ["recorded", "shipped"]


def _name(source: str) -> str:
    # 128 bits distinguish all sources, and keep names short.
    return hashlib.sha256(source.encode()).hexdigest()[:32] + ".so"


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Copy to ``folder`` every kernel that inductor builds, or takes from its cache, in the ``with`` block."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    built: dict[str, list[str]] = {}
    # Inductor has no hook for this; only the method that builds a kernel sees its source.
    build = AsyncCompile.cpp_pybinding

    def record(self: Any, argtypes: list[str], source: str) -> Any:
        built[source] = argtypes
        return build(self, argtypes, source)

    with replaced(AsyncCompile, "cpp_pybinding", record):
        yield
    if not built:  # kernels of a GPU are inside the artifact, and a bundle has no empty folders
        return
    folder.mkdir()
    strip = shutil.which("strip")
    for source, argtypes in built.items():
        # By now the kernel is in inductor's cache, since the graph was compiled with it.
        kernel = CppPythonBindingsCodeCache.load_pybinding(argtypes, source)
        target = folder / _name(source)
        # The entry point is a function of its extension module, which knows its file.
        shutil.copyfile(kernel.__self__.__file__, target)
        if strip is not None:  # debug information contains paths of this machine
            subprocess.run([strip, "--strip-debug", str(target)], check=True)


@contextmanager
def shipped(folder: Path) -> Iterator[None]:
    """Load kernels from ``folder`` in the ``with`` block; those that are missing are compiled."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    build = AsyncCompile.cpp_pybinding

    def find(self: Any, argtypes: list[str], source: str) -> Any:
        file = folder / _name(source)
        if not file.is_file():
            return build(self, argtypes, source)
        # torch has no public way to load a kernel without its source.
        return CppPythonBindingsCodeCache._load_library(str(file.absolute()), file.stem).kernel  # noqa: SLF001

    with replaced(AsyncCompile, "cpp_pybinding", find):
        yield
