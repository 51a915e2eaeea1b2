"""The criterion: an artifact may be at most a little less exact than the eager block in the same dtype.

Where a softmax is nearly tied or the two attentions nearly cancel, the error of *one* right computation can be tiny or
large by luck. So eager's error is taken over several runs on inputs that differ in the last bit.
"""

from dataclasses import dataclass

import numpy as np

from diffdeploy.arrays import Array, epsilon
from diffdeploy.graphs import DType
from diffdeploy.verify.report import CaseReport

__all__ = ["BUDGETS", "Budget", "Yardstick", "judge"]


@dataclass(frozen=True)
class Budget:
    """Allowed error: ``k`` times the eager block's own error, plus a floor.

    Attributes:
        k: factor on eager's error, for the root mean square and for the maximum alike.
        rmse_floor: in units of ``eps(dtype) * rms(expected)``.
        max_floor: in units of ``eps(dtype) * max|expected|``.
    """

    k: float
    rmse_floor: float
    max_floor: float


# How the numbers were found: `make slow` exports random right blocks and reports the share of the budget that they use.
# With k = 2 and floors of 1 and 2, 1,953 fp32 cases of 100 such blocks used at most 2.04 (and 18 were rejected); with
# 2.5 times as much, 3,800 cases of 200 blocks used at most 1.02 (and 1 was rejected). The outliers: lucky yardsticks,
# sums of equal numbers that eager rounds exactly, and norms that a backend decomposes. So fp32 gets four times as much.
# 2,000 fp16 cases used at most 0.69 of a budget with k = 3. One weight off by a thousandth uses 0.7 of the fp32 budget:
# it is the contract that sees it. The next smallest fault of the tests, a rotary base off by 5 %, uses 7,000 budgets.
# floors: outputs are stored in the dtype, so even a perfect computation is off by up to eps/2 per element.
BUDGETS: dict[DType, Budget] = {
    "float32": Budget(k=8.0, rmse_floor=4.0, max_floor=8.0),
    "float16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
    "bfloat16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
}


def _first(mask: Array) -> str:
    return str([int(i) for i in np.argwhere(mask)[0]])


def _non_finite_differs(actual: Array, expected: Array) -> str | None:
    """Where NaN and the infinities are not where the exact result, rounded to the dtype, has them."""
    with np.errstate(over="ignore"):
        rounded = expected.astype(actual.dtype)
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = test(actual) != test(rounded)
        if differs.any():
            where = _first(differs)
            return f"{name} differs from the exact result, first at {where} ({int(differs.sum())} elements)"
    return None


class Yardstick:
    """Error of the eager block against fp64, over runs that differ in the last bits of their inputs."""

    def __init__(self, expected: Array) -> None:
        self._expected = expected
        self._squares: list[float] = []
        self.max_error = 0.0

    def add(self, eager: Array) -> None:
        """Take in one run, of the shape of ``expected`` and in the artifact's dtype."""
        error = np.abs(eager.astype(np.float64) - self._expected)
        self._squares.append(float(np.mean(error**2)))
        self.max_error = max(self.max_error, float(error.max(initial=0.0)))

    @property
    def rmse(self) -> float:
        """Root mean square over all runs and elements."""
        return float(np.sqrt(np.mean(self._squares)))

    @property
    def finite(self) -> bool:
        """Whether no run gave NaN or infinity."""
        return bool(np.isfinite(self._squares).all())


def judge(case_id: str, output: str, actual: Array, yardstick: Yardstick, expected: Array, dtype: DType) -> CaseReport:
    """Compare one output with the exact one.

    Args:
        case_id: name for the report.
        output: name of the output.
        actual: of the artifact, in its dtype.
        yardstick: error of the eager block.
        expected: exact, float64.
        dtype: of the artifact.
    """
    if actual.shape != expected.shape or actual.dtype != np.dtype(dtype):
        return CaseReport.failed(
            case_id,
            f"the output is {actual.dtype.name} {list(actual.shape)}, expected {dtype} {list(expected.shape)}",
            output,
        )
    if reason := _non_finite_differs(actual, expected):
        return CaseReport.failed(case_id, reason, output)
    finite = np.isfinite(actual) & np.isfinite(expected)
    exact = expected[finite]
    if exact.size == 0:
        return CaseReport(id=case_id, output=output, passed=True, budget_used=0.0)
    errors = np.abs(actual.astype(np.float64) - expected)
    error = errors[finite]
    if not yardstick.finite:
        return CaseReport.failed(case_id, "there is no yardstick: the eager block gives NaN or infinity", output)
    budget, eps = BUDGETS[dtype], epsilon(dtype)
    rmse, max_error = float(np.sqrt(np.mean(error**2))), float(error.max())
    allowed_rmse = budget.k * yardstick.rmse + budget.rmse_floor * eps * float(np.sqrt(np.mean(exact**2)))
    allowed_max = budget.k * yardstick.max_error + budget.max_floor * eps * float(np.abs(exact).max())
    used = max(_share(rmse, allowed_rmse), _share(max_error, allowed_max))
    return CaseReport(
        id=case_id,
        output=output,
        passed=used <= 1.0,
        budget_used=used if np.isfinite(used) else None,
        rmse=rmse,
        eager_rmse=yardstick.rmse,
        max_error=max_error,
        eager_max_error=yardstick.max_error,
        worst_index=[int(i) for i in np.unravel_index(int(np.argmax(errors)), actual.shape)],
        reason=None if used <= 1.0 else "the error is above the budget",
    )


def _share(error: float, allowed: float) -> float:
    """``error / allowed``; where nothing is allowed, only no error passes."""
    if allowed > 0.0:
        return error / allowed
    return 0.0 if error == 0.0 else float("inf")
