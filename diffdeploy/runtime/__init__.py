"""Running bundles: `load` checks a bundle and opens it with the backend of its format."""

from diffdeploy.runtime.generation import eos_of
from diffdeploy.runtime.inputs import check_inputs
from diffdeploy.runtime.loading import least_versions, load, open_runtime, require_runnable, require_trusted
from diffdeploy.runtime.runtime import Runtime

__all__ = [
    "Runtime",
    "check_inputs",
    "eos_of",
    "least_versions",
    "load",
    "open_runtime",
    "require_runnable",
    "require_trusted",
]
