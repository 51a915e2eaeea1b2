"""Check that a candidate computes the block, at the size and on the inputs with which it is timed.

The criterion is that of `diffdeploy.verify.metrics`: the error against the exact result may be a few times that of the
eager block in the same dtype. If all heads together have at most ``2^27`` scores (one row of 4096 tokens and 8 heads),
the exact result is the formula in numpy fp64, and the yardstick is ``naive``. Above that, both come from the eager
block with ``impl="padded"``, run in fp64 and in the dtype; its memory does not grow with the square of the length.
Correct implementations use 10 to 25 % of the budget in both regimes; at sizes where both are possible, the two results
agree within 3 percentage points (float32 and float16, lengths 256 to 2048, inputs of N(0, 1) and N(0, 16)).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array, to_array
from diffdeploy.bench.candidate_run import Run
from diffdeploy.bench.operations import num_scores
from diffdeploy.bench.plan import Plan, Size
from diffdeploy.config import AnyConfig
from diffdeploy.modules import block_class
from diffdeploy.ops import Impl
from diffdeploy.verify.eager import RunArrays, eager_error, run_arrays
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.oracle import exact_and_stored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_ORACLE_SCORES", "Verdict", "expected_outputs", "judge_candidate"]

# The oracle takes about half a minute for this on two cores; twice the length takes four times as long.
MAX_ORACLE_SCORES = 2**27


@dataclass(frozen=True)
class Verdict:
    """The verdict on one candidate at one size.

    Attributes:
        passed: true if it may be timed.
        budget_used: error divided by the allowed error; ``None`` if there is no number.
        reason: reason for a failure.
    """

    passed: bool
    budget_used: float | None
    reason: str | None


def expected_outputs(
    plan: Plan, config: AnyConfig, weights: Mapping[str, "Tensor"], inputs: Mapping[str, "Tensor"], size: Size
) -> dict[str, Yardstick]:
    """Compute the exact result, and the allowed error of a correct candidate.

    Args:
        plan: plan of the run; the eager block runs on its device.
        config: config of the formula.
        weights: canonical weights.
        inputs: inputs by name, on the CPU.
        size: size of the inputs.

    Returns:
        A yardstick for each output, by name.
    """
    import torch

    arrays = {name: to_array(tensor) for name, tensor in inputs.items()}
    stored: list[Array] = []
    if num_scores(config, size) <= MAX_ORACLE_SCORES:
        impl = Impl.NAIVE
        # Computed from the weights in the run's dtype, as in the candidates.
        exact_weights = {name: to_array(tensor.double()) for name, tensor in weights.items()}
        exact, stored = exact_and_stored(config, exact_weights, arrays, plan.dtype)
    else:
        impl = Impl.PADDED
        exact = _eager(plan, config, weights, impl, torch.float64)(arrays)
    yardsticks = eager_error(_eager(plan, config, weights, impl, getattr(torch, plan.dtype)), arrays, exact, plan.dtype)
    for output in stored:
        # Only the output is a difference of two stored streams; the caches are not.
        yardsticks["output"].add_stored(output)
    return yardsticks


def _eager(plan: Plan, config: AnyConfig, weights: Mapping[str, "Tensor"], impl: Impl, dtype: Any) -> RunArrays:
    """The eager block on the plan's device, as a function of arrays."""
    block = block_class(config).from_weights(config, weights, impl=impl, max_positions=plan.max_positions, dtype=dtype)
    return run_arrays(block.to(plan.device), device=plan.device, dtype=dtype)


def judge_candidate(run: Run, inputs: Mapping[str, "Tensor"], expected: Mapping[str, Yardstick]) -> Verdict:
    """Run a candidate once and judge its outputs; an exception counts as a failure."""
    try:
        outputs = run(inputs)
    except Exception as error:  # noqa: BLE001 - a candidate that fails is wrong, and the others are measured
        return Verdict(False, None, f"it did not run: {type(error).__name__}: {str(error).strip()}")
    reports = [measure(name, to_array(outputs[name]), yardstick) for name, yardstick in expected.items()]
    worst = max(reports, key=lambda report: report.severity)
    return Verdict(worst.passed, worst.budget_used, worst.reason)
