"""Locating the guilty stage by the best available evidence: a constant, the artifact's own values, or probes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, read_weights
from diffdeploy.errors import ExportError
from diffdeploy.formats import Check, Intermediates, require_format
from diffdeploy.graphs import Stage, stage_of_weight
from diffdeploy.locate.finding import Finding

__all__ = ["by_values", "locate"]


class _Runs(Protocol):
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...


def locate(
    bundle: Bundle, artifact: _Runs, checks: Sequence[Check], inputs: Sequence[Mapping[str, Array]]
) -> Finding | None:
    """Name the first stage that deviates in an artifact that failed.

    Args:
        bundle: the bundle that failed.
        artifact: object that runs inputs and raises ExportError if the artifact does not run.
        checks: structural checks of the bundle.
        inputs: inputs to try until one shows a stage that deviates.

    Returns:
        The finding; ``None`` if there is no evidence, since no constant is named and no case failed.
    """
    # A named constant is certain evidence; a comparison of values is only approximate.
    if (finding := _by_constants(checks)) is not None or not inputs:
        return finding
    try:
        shown = require_format(bundle.manifest.format).intermediates(bundle)
    except ExportError as error:
        return _does_not_run(error)
    if shown is None:
        from diffdeploy.locate.probes import by_probes

        return by_probes(bundle, artifact)
    # The first input distinguishes the stages. If the fault has no effect on it, the case that failed is needed.
    for one in inputs:
        finding = by_values(bundle, artifact, one, shown)
        if finding.stage is not None:
            break
    return finding


def _by_constants(checks: Sequence[Check]) -> Finding | None:
    """Finding for the first stage with a constant that a check found to be wrong."""
    found = {stage: check.detail for check in checks if not check.passed for stage in _stages_named(check)}
    # In the order of the formula, since later stages inherit errors of earlier ones.
    first = next((stage for stage in Stage if stage in found), None)
    return None if first is None else Finding(stage=first, found_by="constants", detail=found[first])


def _stages_named(check: Check) -> set[Stage]:
    if check.name in ("lambda", "rope"):
        return {Stage(check.name)}
    if check.name != "weights":
        return set()
    return {stage_of_weight(word) for word in check.detail.split() if word.endswith((".weight", ".bias"))}


def by_values(bundle: Bundle, artifact: _Runs, inputs: Mapping[str, Array], shown: Intermediates) -> Finding:
    """Compare every stage that the artifact shows with its correct value."""
    import torch

    from diffdeploy.arrays import to_tensor
    from diffdeploy.locate.matching import Matcher
    from diffdeploy.locate.values import stage_values

    manifest, weights = bundle.manifest, read_weights(bundle)
    dtype = getattr(torch, manifest.graph.dtype)
    exact, eager = (stage_values(manifest.block, weights, inputs, kind) for kind in (torch.float64, dtype))
    matcher = Matcher(exact, eager, manifest.graph.dtype, by_stream=shown.by_stream, hidden=shown.hidden)
    try:
        for node, value in shown.values(inputs):
            matcher.offer(node, value)
        outputs = artifact.run(inputs)
    except ExportError as error:  # an artifact that does not run is a finding, too
        return _does_not_run(error)
    matcher.offer_outputs({name: to_tensor(array) for name, array in outputs.items()})
    return matcher.finding()


def _does_not_run(error: ExportError) -> Finding:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Finding(stage=None, found_by="intermediate values", detail=f"it does not run: {reason}")
