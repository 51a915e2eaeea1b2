"""The C++ compiler that inductor calls; see ``torch._inductor.config.cpp.cxx``."""

import os
import shutil

__all__ = ["compiler", "compiler_path", "why_not_compile"]


def compiler() -> str:
    """Name or path of the compiler: the environment variable ``CXX``, else ``g++``."""
    return os.environ.get("CXX", "g++")


def compiler_path() -> str | None:
    """Path of the compiler; ``None`` if it is not found."""
    return shutil.which(compiler())


def why_not_compile() -> str | None:
    """Reason why C++ cannot be compiled here; ``None`` if it can.

    The text completes a sentence that begins with the name of whatever needs the compiler.
    """
    if compiler_path() is None:
        return f"compiles C++, but {compiler()} is not found; install it or set CXX"
    return None
