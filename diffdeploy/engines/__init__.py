"""Other people's engines: what they need to run differential attention, and whether they compute what weights say."""

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
