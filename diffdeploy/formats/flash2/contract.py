"""The contract of a ``flash2`` bundle: the block's state, and the number of calls, which follows from its widths."""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import declared_facts, make_check, state_checks
from diffdeploy.ops.flash2 import num_calls

__all__ = ["checks", "facts"]


def _calls(bundle: Bundle) -> int:
    config = bundle.manifest.block
    return num_calls(config.head_dim, config.value_dim, shares_keys=config.streams_share_keys)


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    return declared_facts(bundle, _calls(bundle))


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    # Nothing to compare with: the calls follow from the widths, and the code that makes them is not shipped.
    return [make_check("attention", [], f"{_calls(bundle)} calls of flash-attn"), *state_checks(bundle, weights)]
