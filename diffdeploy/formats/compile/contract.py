"""The contract of a ``compile`` bundle: two fused attentions in the code that inductor wrote, and the block's state."""

import re
from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.formats.artifact import ArtifactFacts, Check
from diffdeploy.formats.checks import attentions, declared_facts, make_check, state_checks
from diffdeploy.formats.compile.backend import ARTIFACT

__all__ = ["checks", "facts"]

# Inductor's wrapper is Python source inside the artifact; the operator that it calls depends on the device. Graphs are
# stored next to it as text, but only lines of the wrapper contain names of buffers; equal lines are copies of one call.
# With `fused`, every attention has one call of `prefill`, the kernel for any number of queries; such calls are indented
# further than the trial runs of the kernel.
_ATTENTION = re.compile(
    rb"\b\w*buf\d+ = torch\.ops\.aten\._scaled_dot_product_\w+\.default\([^\n\\]*"
    rb"| {8}prefill_\d+\.run\([^\n\\]*"
)


def _attentions(bundle: Bundle) -> int:
    return len(set(_ATTENTION.findall((bundle.path / ARTIFACT).read_bytes())))


def facts(bundle: Bundle) -> ArtifactFacts:
    """See `Format.facts`."""
    return declared_facts(bundle, _attentions(bundle))


def checks(bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
    """See `Format.contract`."""
    count = _attentions(bundle)
    found, expected = f"{count} fused-attention calls", attentions(bundle)
    problems = [] if count == expected else [f"{found}; expected {expected}"]
    return [make_check("attention", problems, found), *state_checks(bundle, weights)]
