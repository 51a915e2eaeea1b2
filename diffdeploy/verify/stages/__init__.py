"""The guilty stage: where an artifact that failed verification first deviates."""

from diffdeploy.graphs import Stage
from diffdeploy.verify.stages.finding import Finding, StageError

__all__ = ["Finding", "Stage", "StageError"]
