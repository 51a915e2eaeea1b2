"""The contract of a ``flash2`` bundle: the block's state, and the calls that its widths lead to."""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.ops.flash2 import num_calls
from diffdeploy.verify.contracts.common import check, declared, state_checks
from diffdeploy.verify.report import Check, GraphFacts

__all__ = ["checks", "facts"]


def _calls(bundle: Bundle) -> int:
    config = bundle.manifest.config
    return num_calls(config.head_dim, config.value_dim)


def facts(bundle: Bundle) -> GraphFacts:
    """See `diffdeploy.verify.contracts.facts`."""
    return declared(bundle, _calls(bundle))


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `diffdeploy.verify.contracts.checks`."""
    return [check("attention", [], f"{_calls(bundle)} calls of flash-attn"), *state_checks(bundle, weights)]
