"""The criterion: an artifact may be at most a little less exact than the eager block in the same dtype."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffdeploy.graphs import DType
from diffdeploy.verify.report import CaseReport

__all__ = ["BUDGETS", "Budget", "judge"]

Array = np.ndarray[Any, np.dtype[Any]]


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


# k: two right computations in one dtype differ by the order of their sums. fp16 gets 3, since backends differ in what
#    they keep in fp32 (eager rounds the probabilities to fp16, onnxruntime rounds other intermediates).
# floors: outputs are stored in the dtype, so a perfect computation is off by up to eps/2 per element already, and one
#    more such rounding must be free where eager happens to hit the exact value.
BUDGETS: dict[DType, Budget] = {
    "float32": Budget(k=2.0, rmse_floor=1.0, max_floor=2.0),
    "float16": Budget(k=3.0, rmse_floor=1.0, max_floor=2.0),
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


def judge(case_id: str, actual: Array, eager: Array, expected: Array) -> CaseReport:
    """Compare one output with the exact one.

    Args:
        case_id: name for the report.
        actual: of the artifact, in its dtype.
        eager: of the eager block, same shape and dtype.
        expected: exact, float64.
    """
    dtype: DType = "float16" if eager.dtype == np.float16 else "float32"
    if actual.shape != expected.shape or actual.dtype != eager.dtype:
        return CaseReport.failed(
            case_id,
            f"the output is {actual.dtype.name} {list(actual.shape)}, expected {dtype} {list(expected.shape)}",
        )
    if reason := _non_finite_differs(actual, expected):
        return CaseReport.failed(case_id, reason)
    finite = np.isfinite(actual) & np.isfinite(expected)
    exact = expected[finite]
    if exact.size == 0:
        return CaseReport(id=case_id, passed=True, budget_used=0.0)
    error, eager_error = np.abs(actual[finite] - exact), np.abs(eager[finite] - exact)
    if not np.isfinite(eager_error).all():
        return CaseReport.failed(case_id, "the eager block gives NaN or infinity here, so there is no yardstick")
    budget, eps = BUDGETS[dtype], float(np.finfo(dtype).eps)
    rmse, eager_rmse = (float(np.sqrt(np.mean(e**2))) for e in (error, eager_error))
    max_error, eager_max = float(error.max()), float(eager_error.max())
    allowed_rmse = budget.k * eager_rmse + budget.rmse_floor * eps * float(np.sqrt(np.mean(exact**2)))
    allowed_max = budget.k * eager_max + budget.max_floor * eps * float(np.abs(exact).max())
    used = max(_share(rmse, allowed_rmse), _share(max_error, allowed_max))
    return CaseReport(
        id=case_id,
        passed=used <= 1.0,
        budget_used=used if np.isfinite(used) else None,
        rmse=rmse,
        eager_rmse=eager_rmse,
        max_error=max_error,
        eager_max_error=eager_max,
        worst_index=[int(i) for i in np.unravel_index(int(np.argmax(np.abs(actual - expected))), actual.shape)],
        reason=None if used <= 1.0 else "the error is above the budget",
    )


def _share(error: float, allowed: float) -> float:
    """``error / allowed``; where nothing is allowed, only no error passes."""
    if allowed > 0.0:
        return error / allowed
    return 0.0 if error == 0.0 else float("inf")
