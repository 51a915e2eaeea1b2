"""Matching of an artifact's intermediate values with stages by content, so that no names of nodes are needed.

Shape suffixes: B batch, H heads, S query length, w any width.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdeploy.budgets import BUDGETS
from diffdeploy.graphs import DType, Stage
from diffdeploy.locate.finding import Finding, StageError
from diffdeploy.locate.values import StageValues

__all__ = ["Matcher"]

_OUTPUTS = {Stage.CACHE: ("present.key", "present.value"), Stage.OUTPUT_PROJECTION: ("output",)}

# Stages that an artifact may compute for each stream separately.
_OF_STREAMS = (Stage.Q_PROJECTION, Stage.K_PROJECTION, Stage.ROPE)

# Factor on a budget, since budgets are meant for whole blocks and several runs of eager, but a stage is compared with
# one run. Stages of 48 correct exports, in every format that shows them, used up to a third of one budget.
_SLACK = 2.0

# In epsilons of the dtype: maximum error at which a value still counts as that of a stage. Eager stages are off by up
# to 12; in correct exports, swapped streams come no closer than 91, in bfloat16 with lambda near 1.
_ROUNDINGS = 64

# In epsilons of the dtype: root mean square error of rounding every number once. Eager can be exact by chance.
_ONE_ROUNDING = 1 / 4

# Number of axes of ``[B, S, D]``; values with fewer axes are masks, tables or sizes, and not stages.
_FEWEST_AXES = 3


@dataclass
class _Wanted:
    """One value that a stage should have, and the nearest value of the artifact so far."""

    stage: Stage
    exact: Tensor
    eager_rmse: float
    rounding_rmse: float
    streams: "tuple[_Wanted, ...]" = ()  # the values of each stream, if the artifact may compute them separately
    nearest: tuple[bool, float, str] | None = None

    def offer(self, node: str, value: Tensor) -> None:
        """Take the value if it has the right shape and is nearer than the previous ones."""
        for stream in self.streams:
            stream.offer(node, value)
        # Rows that are not split into heads yet could belong to another projection, so they count only if nothing else
        # matches.
        candidates = [(False, form) for form in _split_forms(value, self.exact.shape)]
        candidates += [(True, form) for form in _joined_forms(value, self.exact.shape)]
        for joined, form in candidates:
            rmse = float((form.to(torch.float64) - self.exact).square().mean().sqrt())
            # NaN compares false with everything, and would stay the nearest value forever.
            found = (joined, rmse if rmse == rmse else float("inf"), node)
            if self.nearest is None or found[:2] < self.nearest[:2]:
                self.nearest = found


def _split_forms(value: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """Yield the value as ``[B, H, S, w]`` for every layout of heads that attention code uses."""
    batch, heads, length, width = shape
    if value.ndim == 4 and value.shape[:3] == shape[:3] and value.shape[3] >= width:
        yield value[..., :width]  # padded with zeros for kernels that require equal widths
    if value.shape == (batch, length, heads, width):
        yield value.transpose(1, 2)
    if value.shape == (batch * heads, length, width):
        yield value.reshape(shape)
    if value.shape == (batch, heads, width, length):
        yield value.transpose(2, 3)


def _joined_forms(value: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """Yield the value as ``[B, H, S, w]`` if its heads are joined."""
    batch, heads, length, width = shape
    if value.shape == (batch, length, heads * width):
        yield value.reshape(batch, length, heads, width).transpose(1, 2)


class Matcher:
    """Compares the artifact's values one at a time, without keeping them, and names the first stage that deviates.

    Args:
        exact: stages in fp64.
        eager: stages in the artifact's dtype.
        dtype: dtype of the artifact.
        by_stream: true if the artifact computes the queries and keys of each stream separately.
        hidden: stages inside fused operators, whose results are not among the values.
    """

    def __init__(
        self,
        exact: StageValues,
        eager: StageValues,
        dtype: DType,
        *,
        by_stream: bool = False,
        hidden: Collection[Stage] = (),
    ) -> None:
        self._budget = BUDGETS[dtype]
        eps = torch.finfo(getattr(torch, dtype)).eps

        def wanted(stage: Stage, value: Tensor, rounded: Tensor, *, apart: bool) -> _Wanted:
            error = float((rounded.to(torch.float64) - value).square().mean().sqrt())
            # An odd number of heads has no pairs of streams: both streams share their keys.
            numbers = (0, 1) if apart and value.shape[1] % 2 == 0 else ()
            streams = tuple(wanted(stage, value[:, s::2], rounded[:, s::2], apart=False) for s in numbers)
            return _Wanted(stage, value, error, eps * float(value.square().mean().sqrt()), streams)

        self._wanted = [
            wanted(stage, value, rounded, apart=by_stream and stage in _OF_STREAMS)
            for stage in exact
            if stage not in hidden
            for value, rounded in zip(exact[stage], eager[stage], strict=True)
        ]
        # With swapped streams, both attentions are correct, and only the difference shows the fault.
        signal, noise, weighted = (exact[s][0] for s in (Stage.SIGNAL, Stage.NOISE, Stage.LAMBDA))
        lam = (weighted * noise).sum(-1, keepdim=True) / noise.square().sum(-1, keepdim=True)
        # A fully masked query has no noise, and its lambda would be 0 / 0.
        exchanged = noise - lam.nan_to_num() * signal
        self._exchanged = _Wanted(Stage.SIGNAL, exchanged, 0.0, eps * float(exchanged.square().mean().sqrt()))

    def offer(self, node: str, value: Tensor) -> None:
        """Compare an intermediate value of the artifact with all inner stages."""
        if value.is_floating_point() and value.ndim >= _FEWEST_AXES:
            for wanted in (*self._wanted, self._exchanged):
                if wanted.stage not in _OUTPUTS:
                    wanted.offer(node, value)

    def offer_outputs(self, outputs: Mapping[str, Tensor]) -> None:
        """Compare the artifact's outputs with their stages, for which no intermediate value can substitute."""
        for stage, names in _OUTPUTS.items():
            wanted = [value for value in self._wanted if value.stage == stage]
            # Not strict, since a block without a cache lacks the cache outputs.
            for value, name in zip(wanted, names, strict=False):
                value.offer(name, outputs[name])

    def finding(self) -> Finding:
        """Return the verdict on all values that were offered."""
        errors = map(self._least_error, self._wanted)
        stages = [error for error in errors if error is not None]
        guilty = next((error for error in stages if error.deviates), None)
        if guilty is None:
            detail = "every stage that the artifact shows is correct on its own"
            return Finding(stage=None, found_by="intermediate values", detail=detail, stages=stages)
        stage, node = guilty.stage, guilty.node
        # With swapped streams, lambda times the noise is the first value that is missing, though lambda is correct.
        if stage == Stage.LAMBDA and self._within(self._exchanged):
            stage, node = Stage.SIGNAL, None
        detail = _distance(guilty)
        return Finding(stage=stage, found_by="intermediate values", node=node, detail=detail, stages=stages)

    def _within(self, wanted: _Wanted) -> bool:
        return wanted.nearest is not None and wanted.nearest[1] <= _ROUNDINGS * wanted.rounding_rmse

    def _least_error(self, whole: _Wanted) -> StageError | None:
        """Error of the whole value or of the worse stream; ``None`` if the artifact shows neither."""
        errors = [] if whole.nearest is None else [self._error(whole)]
        if whole.streams and all(stream.nearest is not None for stream in whole.streams):
            errors.append(max(map(self._error, whole.streams), key=_severity))
        return min(errors, key=_severity, default=None)

    def _error(self, wanted: _Wanted) -> StageError:
        assert wanted.nearest is not None
        _, rmse, node = wanted.nearest
        allowed = self._budget.k * wanted.eager_rmse + self._budget.rmse_floor * wanted.rounding_rmse
        least = max(wanted.eager_rmse, _ONE_ROUNDING * wanted.rounding_rmse)
        finite = rmse < float("inf")
        return StageError(
            stage=wanted.stage,
            rmse=rmse if finite else None,
            eager_rmse=wanted.eager_rmse,
            amplification=rmse / least if finite and least > 0.0 else None,
            deviates=rmse > _SLACK * allowed,
            node=node,
        )


def _severity(error: StageError) -> float:
    return float("inf") if error.amplification is None else error.amplification


def _distance(error: StageError) -> str:
    if error.amplification is None:
        return "its error is not finite, or eager has no error to compare it with"
    return f"it is {error.amplification:.3g} times as far off as eager"
