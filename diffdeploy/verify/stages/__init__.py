"""The guilty stage: where an artifact that failed verification first deviates."""

from diffdeploy.verify.stages.finding import Finding, StageError
from diffdeploy.verify.stages.names import Stage

__all__ = ["Finding", "Stage", "StageError"]
