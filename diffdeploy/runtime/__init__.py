"""Running bundles: `load` checks a bundle and opens it with the backend of its format."""

from diffdeploy.runtime.base import Runtime, load, require_backend, why_not_run

__all__ = ["Runtime", "load", "require_backend", "why_not_run"]
