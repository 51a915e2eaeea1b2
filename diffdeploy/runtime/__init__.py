"""Running bundles: `load` checks a bundle and opens it with the backend of its format."""

from diffdeploy.runtime.base import RunOptions, Runtime
from diffdeploy.runtime.inputs import check_inputs
from diffdeploy.runtime.loading import RUNNABLE_FORMATS, load, require_runnable, why_not_run

__all__ = ["RUNNABLE_FORMATS", "RunOptions", "Runtime", "check_inputs", "load", "require_runnable", "why_not_run"]
