"""Finding the guilty stage, by the best evidence there is: a constant, the artifact's own values, or probes."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, Bundle
from diffdeploy.graphs import Stage, stage_of_weight
from diffdeploy.verify.stages.finding import Finding

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.verify.report import Check

__all__ = ["by_values", "locate"]

# Formats whose artifacts show the values inside; of the others only outputs can be seen.
_INSIDE = {"onnx": "diffdeploy.verify.stages.onnx", "pt2": "diffdeploy.verify.stages.pt2"}


class _Runs(Protocol):
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...


class _Inside(Protocol):
    def what_is_shown(self, directory: Path) -> dict[str, Any]: ...

    def intermediate_values(self, directory: Path, inputs: Mapping[str, Array]) -> "Iterator[tuple[str, Tensor]]": ...


def locate(
    bundle: Bundle, artifact: _Runs, checks: "Sequence[Check]", inputs: Sequence[Mapping[str, Array]]
) -> Finding | None:
    """Name the first stage that deviates, of an artifact that failed.

    Args:
        bundle: what failed.
        artifact: runs inputs.
        checks: its structural checks.
        inputs: to look at, until one shows a stage that deviates.

    Returns:
        ``None`` when there is nothing to go by: no constant is named, and no case failed.
    """
    if (finding := _by_constants(checks)) is not None or not inputs:
        return finding
    if bundle.manifest.format not in _INSIDE:
        from diffdeploy.verify.stages.probes import by_probes

        return by_probes(bundle, artifact)
    for one in inputs:
        finding = by_values(bundle, artifact, one)
        if finding.stage is not None:
            break
    return finding


def _by_constants(checks: "Sequence[Check]") -> Finding | None:
    """The first stage with a constant that a check has found to be another one."""
    found = {stage: check.detail for check in checks if not check.passed for stage in _stages_named(check)}
    first = next((stage for stage in Stage if stage in found), None)
    return None if first is None else Finding(stage=first, found_by="constants", detail=found[first])


def _stages_named(check: "Check") -> set[Stage]:
    if check.name in ("lambda", "rope"):
        return {Stage(check.name)}
    if check.name != "weights":
        return set()
    return {stage_of_weight(word) for word in check.detail.split() if word.endswith((".weight", ".bias"))}


def by_values(bundle: Bundle, artifact: _Runs, inputs: Mapping[str, Array]) -> Finding:
    """Compare every stage that the artifact shows with what it should be."""
    import torch

    from diffdeploy.arrays import to_tensor
    from diffdeploy.verify.stages.matching import Matcher
    from diffdeploy.verify.stages.values import stage_values

    manifest, weights = bundle.manifest, read_safetensors(bundle.path / WEIGHTS)
    dtype = getattr(torch, manifest.graph.dtype)
    exact, eager = (stage_values(manifest.config, weights, inputs, kind) for kind in (torch.float64, dtype))
    inside: _Inside = import_module(_INSIDE[manifest.format])
    try:
        matcher = Matcher(exact, eager, manifest.graph.dtype, **inside.what_is_shown(bundle.path))
        for node, value in inside.intermediate_values(bundle.path, inputs):
            matcher.offer(node, value)
        matcher.offer_outputs({name: to_tensor(array) for name, array in artifact.run(inputs).items()})
    except Exception as error:  # an artifact that does not run is a finding of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Finding(stage=None, found_by="intermediate values", detail=f"it does not run: {reason}")
    return matcher.finding()
