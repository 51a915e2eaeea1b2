"""Third-party engines: the parts they need for differential attention, and the verification of their results."""

from diffdeploy.engines.base import Engine, EngineRequest, EngineRound, EngineRow, Subject
from diffdeploy.engines.rows import engine_names, require_engine

__all__ = [
    "Engine",
    "EngineRequest",
    "EngineRound",
    "EngineRow",
    "Subject",
    "engine_names",
    "require_engine",
]
