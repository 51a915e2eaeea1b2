"""Locating the guilty stage: the first one at which an artifact that failed verification deviates."""

from diffdeploy.locate.finding import Finding, StageError
from diffdeploy.locate.locate import locate

__all__ = ["Finding", "StageError", "locate"]
