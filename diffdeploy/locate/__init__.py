"""Locating the guilty stage: where an artifact that failed verification first deviates."""

from diffdeploy.locate.finding import Finding, StageError
from diffdeploy.locate.locate import locate

__all__ = ["Finding", "StageError", "locate"]
