"""Running bundles: `load` checks a bundle and opens it with the backend of its format."""

from diffdeploy.runtime.base import RunOptions, Runtime
from diffdeploy.runtime.loading import load, require_runnable, why_not_run

__all__ = ["RunOptions", "Runtime", "load", "require_runnable", "why_not_run"]
