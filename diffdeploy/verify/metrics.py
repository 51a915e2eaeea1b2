"""The criterion: an artifact may be at most slightly less exact than a correct computation in the same dtype.

Where a softmax is nearly tied, the error of *one* correct computation can be tiny or large by chance, so eager's error
is taken over several runs on inputs that differ in the last bit. Where the two attentions nearly cancel, eager, which
subtracts probabilities, is inherently exact; an artifact, which subtracts the results of two operators, cannot be,
so the error of storing those results counts too.
"""

import math
from typing import NamedTuple

import numpy as np

from diffdeploy.arrays import Array, epsilon, smallest_normal
from diffdeploy.budgets import ACTIVATION_SHARE, BUDGETS, CEILINGS, Budget
from diffdeploy.graphs import DType
from diffdeploy.verify.report import CaseReport, OutputReport, Report

__all__ = ["Deviation", "Yardstick", "judge", "measure", "rejudge"]

# Numbers of an output that are compared at once: in float64, all logits of a prompt would take hundreds of megabytes.
_AT_ONCE = 2**22


class Deviation(NamedTuple):
    """Absolute errors of some values, over the elements that count.

    mean_square: mean of their squares; 0 if there are none.
    largest: the largest of them, or NaN if one is NaN; 0 if there are none.
    where: index of the largest among all elements, flattened.
    """

    mean_square: float
    largest: float
    where: int


class Yardstick:
    """Error of the eager block against fp64, over runs that differ in the last bits of their inputs.

    Errors are measured only for elements whose exact value is finite in the dtype; the others have no error, only a
    kind: NaN or one of the infinities. Where eager returns another kind (it overflows on the way, or multiplies a
    hidden NaN by 0), a correct artifact may as well, and the element is not judged.

    Args:
        expected: exact result, float64.
        dtype: dtype of the artifact.
    """

    def __init__(self, expected: Array, dtype: DType) -> None:
        self.expected, self.dtype = expected, dtype
        counts = np.isfinite(self.rounded)
        # Usually all elements count; the arrays then take no memory, which the caches of a model would need a lot of.
        self.counts: Array = np.broadcast_to(np.True_, expected.shape) if counts.all() else counts
        self.unjudged: Array = np.broadcast_to(np.False_, expected.shape)
        self._squares: list[float] = []
        self.max_error = 0.0
        self.storage_rmse, self.storage_max_error = 0.0, 0.0
        self.activation_rmse, self.activation_max_error = 0.0, 0.0

    @property
    def rounded(self) -> Array:
        """The exact result in the dtype of the artifact; numbers beyond its range become infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            rounded: Array = self.expected.astype(self.dtype)
        return rounded

    def add(self, eager: Array) -> None:
        """Add one run, with the shape of ``expected`` and the artifact's dtype."""
        self.set_aside(eager)
        found = self.deviation(eager)
        # Averaged per run and not per element: runs have equally many elements, so the mean over runs is the mean over
        # all.
        self._squares.append(found.mean_square)
        self.max_error = max(self.max_error, found.largest)

    def set_aside(self, eager: Array) -> None:
        """Stop counting elements whose kind in a correct computation differs from the exact one."""
        finite = np.isfinite(eager)
        if finite.all() and self.counts.all():
            return
        rounded = self.rounded
        same_kind = finite & np.isfinite(rounded)
        same_kind |= np.isnan(eager) & np.isnan(rounded)
        same_kind |= np.isinf(eager) & (eager == rounded)
        self.unjudged = self.unjudged | ~same_kind
        self.counts = self.counts & same_kind

    def add_stored(self, output: Array) -> None:
        """Add a float64 result with stored streams, see `exact_and_stored`; of several results, the worst counts."""
        found = self.deviation(output)
        self.storage_rmse = max(self.storage_rmse, math.sqrt(found.mean_square))
        self.storage_max_error = max(self.storage_max_error, found.largest)

    def with_quantised(self, expected: Array) -> "Yardstick":
        """The same yardstick for a result of which the activations are quantised.

        Eager's error is that with float activations, since its own roundings may differ from the formula's, too.

        Args:
            expected: exact result with quantised activations, float64.
        """
        quantised, moved = Yardstick(expected, self.dtype), self.deviation(expected)
        quantised._squares, quantised.max_error = [*self._squares], self.max_error
        quantised.storage_rmse, quantised.storage_max_error = self.storage_rmse, self.storage_max_error
        quantised.activation_rmse = ACTIVATION_SHARE.rmse * math.sqrt(moved.mean_square)
        quantised.activation_max_error = ACTIVATION_SHARE.max_error * moved.largest
        return quantised

    def recall(self, figures: OutputReport) -> None:
        """Add errors that an earlier report recorded, instead of runs."""
        # An output without figures has no yardstick either, and `finite` reports the NaN.
        missing = float("nan")
        self._squares.append(missing if figures.eager_rmse is None else figures.eager_rmse**2)
        self.max_error = missing if figures.eager_max_error is None else figures.eager_max_error
        self.storage_rmse, self.storage_max_error = figures.storage_rmse, figures.storage_max_error
        self.activation_rmse, self.activation_max_error = figures.activation_rmse, figures.activation_max_error

    def deviation(self, values: Array) -> Deviation:
        """Deviation of values with the shape of ``expected`` from it."""
        values, exact, chosen = values.reshape(-1), self.exact, None
        # Selecting would copy hundreds of megabytes of a large output, which is avoided if everything counts.
        if not self.counts.all():
            chosen = np.flatnonzero(self.counts)
            values = values[chosen]
        total, largest, where = 0.0, 0.0, 0
        for start in range(0, exact.size, _AT_ONCE):
            errors = values[start : start + _AT_ONCE].astype(np.float64)
            errors -= exact[start : start + _AT_ONCE]
            np.abs(errors, out=errors)
            total += float(np.vdot(errors, errors))
            first = int(np.argmax(errors))  # of NaN, too
            if not (errors[first] <= largest or math.isnan(largest)):
                largest, where = float(errors[first]), start + first
        if chosen is not None and chosen.size:
            where = int(chosen[where])
        return Deviation(total / max(exact.size, 1), largest, where)

    @property
    def exact(self) -> Array:
        """The exact values of the elements that count, flattened."""
        return self.expected.reshape(-1) if self.counts.all() else self.expected[self.counts]

    @property
    def rmse(self) -> float:
        """Root mean square error over all runs and elements."""
        return float(np.sqrt(np.mean(self._squares)))

    @property
    def finite(self) -> bool:
        """True if every run has a figure."""
        return bool(np.isfinite(self._squares).all())


def _mean_square(values: Array) -> float:
    """Mean of the squares of a flat array, without a copy of it; 0 for an empty one."""
    return float(np.vdot(values, values)) / values.size if values.size else 0.0


def measure(output: str, actual: Array, yardstick: Yardstick, *, is_extreme: bool = False) -> OutputReport:
    """Compare one output with the exact one, and judge it by the budget of its dtype.

    Args:
        output: name of the output.
        actual: output of the artifact.
        yardstick: the exact result, and the error of the eager block.
        is_extreme: true if eager may return NaN or infinity where the exact result has a number; for other inputs, that
            means that the yardstick is broken.
    """
    expected, dtype = yardstick.expected, yardstick.dtype
    if actual.shape != expected.shape or actual.dtype != np.dtype(dtype):
        return OutputReport.failed(
            output, f"it is {actual.dtype.name} {list(actual.shape)}, expected {dtype} {list(expected.shape)}"
        )
    num_unjudged = int(yardstick.unjudged.sum())
    if not yardstick.finite or (num_unjudged and not is_extreme):
        return OutputReport.failed(output, "there is no yardstick: the eager block returns NaN or infinity")
    if not is_extreme and (reason := _no_yardstick(yardstick)):
        return OutputReport.failed(output, reason)
    if reason := _non_finite_differs(actual, yardstick):
        return OutputReport.failed(output, reason)
    # The result has only NaN and infinity, and they agree.
    if not yardstick.counts.any():
        return OutputReport(output=output, passed=True, budget_used=0.0, num_unjudged=num_unjudged)
    found, exact = yardstick.deviation(actual), yardstick.exact
    # The verdict is based on the rounded figures in the report, so that judging them again gives the same verdict.
    figures = OutputReport(
        output=output,
        passed=False,
        rmse=math.sqrt(found.mean_square),
        eager_rmse=yardstick.rmse,
        storage_rmse=yardstick.storage_rmse,
        activation_rmse=yardstick.activation_rmse,
        max_error=found.largest,
        eager_max_error=yardstick.max_error,
        storage_max_error=yardstick.storage_max_error,
        activation_max_error=yardstick.activation_max_error,
        exact_rms=float(np.sqrt(_mean_square(exact))),
        exact_max=float(max(abs(exact.max()), abs(exact.min()))),
        worst_index=[int(i) for i in np.unravel_index(found.where, actual.shape)],
        num_unjudged=num_unjudged,
    )
    return judge(figures, BUDGETS[dtype], dtype)


def _no_yardstick(yardstick: Yardstick) -> str | None:
    """Reason why eager's error cannot serve as a yardstick, if it is larger than rounding explains.

    Where both streams nearly cancel, eager's error may be as large as that of storing them, however large that is.
    Results that vanish have no size to which an error could be compared.
    """
    size = float(np.sqrt(_mean_square(yardstick.exact)))
    ceiling = CEILINGS[yardstick.dtype]
    if size < epsilon(yardstick.dtype) or yardstick.rmse <= max(ceiling * size, yardstick.storage_rmse):
        return None
    return (
        f"there is no yardstick: the eager block itself is off by {yardstick.rmse / size:.2g} of the exact result, but "
        f"rounding to {yardstick.dtype} explains at most {ceiling:g}"
    )


def _non_finite_differs(actual: Array, yardstick: Yardstick) -> str | None:
    """Describe where NaN and infinities differ from those of the exact result, rounded to the dtype."""
    rounded, judged = yardstick.rounded, ~yardstick.unjudged
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = (test(actual) != test(rounded)) & judged
        if differs.any():
            where = [int(i) for i in np.argwhere(differs)[0]]
            return f"{name} differs from the exact result, first at {where} ({int(differs.sum())} elements)"
    return None


def judge(figures: OutputReport, budget: Budget, dtype: DType) -> OutputReport:
    """Judge measured figures; an output without figures stays unchanged.

    Args:
        figures: figures with or without a verdict.
        budget: allowed error.
        dtype: dtype of the artifact.
    """
    if figures.rmse is None or figures.max_error is None:
        return figures
    assert figures.eager_rmse is not None
    assert figures.eager_max_error is not None
    floor_rmse = budget.rmse_floor * _spacing(figures.exact_rms or 0.0, dtype) + figures.activation_rmse
    floor_max = budget.max_floor * _spacing(figures.exact_max or 0.0, dtype) + figures.activation_max_error
    cost_rmse = max(figures.eager_rmse, figures.storage_rmse)
    cost_max = max(figures.eager_max_error, figures.storage_max_error)
    allowed_rmse, allowed_max = budget.k * cost_rmse + floor_rmse, budget.k * cost_max + floor_max
    # This never divides by 0, since the spacing in the floors does not shrink below that of normal numbers.
    used = max(figures.rmse / allowed_rmse, figures.max_error / allowed_max)
    smallest = max(
        _smallest_k(figures.rmse - floor_rmse, cost_rmse), _smallest_k(figures.max_error - floor_max, cost_max)
    )
    verdict = {
        "passed": used <= 1.0,
        "budget_used": used,
        "smallest_k": smallest if np.isfinite(smallest) else None,
        "allowed_rmse": allowed_rmse,
        "allowed_max_error": allowed_max,
        "reason": None if used <= 1.0 else "the error is above the budget",
    }
    # Created anew, since a copy would not round its figures.
    return OutputReport(**{**{name: getattr(figures, name) for name in OutputReport.model_fields}, **verdict})


def _spacing(magnitude: float, dtype: DType) -> float:
    """Approximate distance between neighbouring numbers of that size, at least that of the smallest normal numbers."""
    return epsilon(dtype) * max(magnitude, smallest_normal(dtype))


def _smallest_k(above_floor: float, cost: float) -> float:
    if above_floor <= 0.0:
        return 0.0
    return above_floor / cost if cost > 0.0 else float("inf")


def rejudge(report: Report, budget: Budget) -> Report:
    """Judge the same figures by another budget; checks, and outputs without figures, stay unchanged."""
    cases = [
        CaseReport.of(case.id, case.group, [judge(output, budget, report.dtype) for output in case.outputs])
        for case in report.cases
    ]
    return report.model_copy(update={"budget": budget, "cases": cases})
