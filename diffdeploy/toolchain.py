"""The C++ compiler that inductor calls; see ``torch._inductor.config.cpp.cxx``."""

import os
import shutil

__all__ = ["compiler", "compiler_path"]


def compiler() -> str:
    """Name or path of the compiler: the environment variable ``CXX``, else ``g++``."""
    return os.environ.get("CXX", "g++")


def compiler_path() -> str | None:
    """Path of the compiler; ``None`` if it is not found."""
    return shutil.which(compiler())
