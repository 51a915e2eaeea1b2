"""Contracts: what must hold of an artifact's structure, read from the artifact itself. One module per format."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import DiffDeployError
from diffdeploy.verify.contracts.common import declared
from diffdeploy.verify.report import Check, GraphFacts

__all__ = ["checks", "facts"]


class _Contract(Protocol):
    def facts(self, bundle: Bundle) -> GraphFacts: ...

    def checks(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]: ...


_CONTRACTS = {
    "onnx": "diffdeploy.verify.contracts.onnx",
    "pt2": "diffdeploy.verify.contracts.pt2",
    "aoti": "diffdeploy.verify.contracts.aoti",
    "compile": "diffdeploy.verify.contracts.compile",
    "flash2": "diffdeploy.verify.contracts.flash2",
}


def _contract(bundle: Bundle) -> _Contract:
    contract: Any = import_module(_CONTRACTS[bundle.manifest.format])
    return contract  # type: ignore[no-any-return]  # a module stands for the protocol


def facts(bundle: Bundle) -> GraphFacts:
    """What the artifact says of itself; of one that cannot be read, what the manifest says."""
    try:
        return _contract(bundle).facts(bundle)
    except (DiffDeployError, MemoryError):
        raise
    except Exception:  # `checks` says what is wrong with it
        return declared(bundle, attention_ops=0)


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """Check the artifact's structure against the bundle's manifest and weights.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.
    """
    try:
        return _contract(bundle).checks(bundle, weights)
    except (DiffDeployError, MemoryError):
        raise
    except Exception as error:  # whatever a library raises at a damaged artifact is the finding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [Check(name="readable", passed=False, detail=f"the artifact cannot be read: {reason}")]
