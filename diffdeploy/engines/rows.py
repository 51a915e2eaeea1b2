"""The registry of engines: one row per engine, listed without importing anything."""

from pkgutil import resolve_name
from typing import get_args

from diffdeploy.engines.base import Engine
from diffdeploy.errors import InputError
from diffdeploy.formats import RuntimeName

__all__ = ["engine_names", "require_engine"]

# Location of each class.
_ROWS = {
    "genai": "diffdeploy.engines.genai:GenaiEngine",
    "vllm": "diffdeploy.engines.vllm:VllmEngine",
}


def engine_names() -> tuple[str, ...]:
    """Names of all engines."""
    return tuple(_ROWS)


def require_engine(name: str) -> Engine:
    """Look up an engine by name.

    Raises:
        InputError: there is no engine of that name.
    """
    if name not in _ROWS:
        # Runtimes of artifacts are not engines for models, but can run the usual verification of any bundle.
        runtimes = [each for each in get_args(RuntimeName) if each != "native"]
        raise InputError(f"engine is {name!r}; accepted: {', '.join([*_ROWS, *runtimes])}")
    engine: Engine = resolve_name(_ROWS[name])()
    return engine
