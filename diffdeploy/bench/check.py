"""Whether a candidate computes the block, at the very size and on the very inputs that it is timed with.

The criterion is that of `diffdeploy.verify.metrics`: the error against the exact result may be a few times that of the
eager block in the same dtype. The exact result is the formula in numpy fp64 as long as all heads have up to ``2^27``
scores (one row of 4096 tokens and 8 heads), and the yardstick is ``naive``. Beyond that they are the eager block with
``impl="padded"``, in fp64 and in the dtype, whose memory does not grow with the square of the length. Right
implementations use 10 to 25 % of the budget in both regimes, and the same at sizes that both can do within 3 points
(float32 and float16, lengths 256 to 2048, inputs of N(0, 1) and N(0, 16)).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffdeploy.arrays import Array, to_array
from diffdeploy.bench.blocks import Run
from diffdeploy.bench.operations import num_scores
from diffdeploy.bench.plan import Plan, Size
from diffdeploy.config import AnyConfig
from diffdeploy.graphs import run_block
from diffdeploy.modules import block_class
from diffdeploy.ops import Impl
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.oracle import oracle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_ORACLE_SCORES", "Reference", "Verdict", "check", "reference"]

MAX_ORACLE_SCORES = 2**27
_RUNS = 2


@dataclass(frozen=True)
class Reference:
    """Exact outputs for some inputs, and how far the eager block is from them."""

    exact: Mapping[str, Array]
    yardsticks: Mapping[str, Yardstick]


@dataclass(frozen=True)
class Verdict:
    """On one candidate at one size.

    Attributes:
        passed: whether it may be timed.
        budget_used: error over allowed error; ``None`` where there is no number.
        reason: why it did not pass.
    """

    passed: bool
    budget_used: float | None
    reason: str | None


def reference(
    plan: Plan, config: AnyConfig, weights: Mapping[str, "Tensor"], inputs: Mapping[str, "Tensor"], size: Size
) -> Reference:
    """Compute what a right candidate gives, and how far from it a right one may be.

    Args:
        plan: what is measured; the eager block runs on its device.
        config: of the formula.
        weights: canonical weights.
        inputs: on the CPU.
        size: of the inputs.
    """
    import torch

    small = num_scores(config, size) <= MAX_ORACLE_SCORES
    exact: Mapping[str, Array]
    if small:
        arrays = {name: to_array(tensor) for name, tensor in inputs.items()}
        exact = oracle(config, {name: tensor.double().numpy() for name, tensor in weights.items()}, arrays)
    else:
        exact = _run_eager(plan, config, weights, inputs, Impl.PADDED, torch.float64)
    impl = Impl.NAIVE if small else Impl.PADDED
    yardsticks = {name: Yardstick(exact[name], plan.dtype) for name in exact}
    for nudged in _nudged(inputs, plan.seed):
        outputs = _run_eager(plan, config, weights, nudged, impl, getattr(torch, plan.dtype))
        for name, yardstick in yardsticks.items():
            yardstick.add(outputs[name])
    return Reference(exact, yardsticks)


def _run_eager(
    plan: Plan,
    config: AnyConfig,
    weights: Mapping[str, "Tensor"],
    inputs: Mapping[str, "Tensor"],
    impl: Impl,
    dtype: Any,
) -> dict[str, Array]:
    block = block_class(config).from_weights(config, weights, impl=impl, max_positions=plan.max_positions, dtype=dtype)
    moved = {
        name: tensor.to(plan.device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }
    outputs = run_block(block.to(plan.device), moved)
    return {name: to_array(tensor) for name, tensor in outputs.items()}


def _nudged(inputs: Mapping[str, "Tensor"], seed: int) -> list[Mapping[str, "Tensor"]]:
    """The inputs, and again with every number of ``hidden_states`` moved by about one unit in its last place.

    The error of a single right computation can be small by luck.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    nudged = [inputs]
    x_BSD = inputs["hidden_states"]
    for _ in range(1, _RUNS):
        up = torch.rand(x_BSD.shape, generator=generator) < 0.5
        eps = torch.finfo(x_BSD.dtype).eps
        nudged.append({**inputs, "hidden_states": torch.where(up, x_BSD * (1 + eps), x_BSD * (1 - eps))})
    return nudged


def check(run: Run, inputs: Mapping[str, "Tensor"], expected: Reference, plan: Plan, size: Size) -> Verdict:
    """Run a candidate once and judge what it gives; whatever it raises is the finding."""
    try:
        outputs = run(inputs)
    except Exception as error:
        return Verdict(False, None, f"it did not run: {type(error).__name__}: {str(error).strip()}")
    reports = [measure(name, to_array(outputs[name]), yardstick) for name, yardstick in expected.yardsticks.items()]
    worst = max(reports, key=lambda report: report.severity)
    return Verdict(worst.passed, worst.budget_used, worst.reason)
