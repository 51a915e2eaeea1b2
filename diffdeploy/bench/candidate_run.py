"""Loading a candidate as a function that maps named inputs to named outputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from diffdeploy.arrays import to_tensor
from diffdeploy.bench.plan import SOFTMAX_COMPILED, Candidate, Plan, Size
from diffdeploy.config import AnyConfig
from diffdeploy.formats import RunOptions
from diffdeploy.graphs import GraphSpec, graph_spec, run_graph
from diffdeploy.modules import block_class
from diffdeploy.modules.softmax import SoftmaxAttention, as_second_version
from diffdeploy.runtime import open_runtime
from diffdeploy.verify.cases import Case

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Run", "formula_of", "inputs_of", "load_weights", "open_candidate", "weight_bytes"]

Run = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]


def load_weights(plan: Plan) -> dict[str, "Tensor"]:
    """Read the canonical weights of the plan's block, on the CPU."""
    from safetensors.torch import load_file

    return load_file(plan.weights)


def open_candidate(plan: Plan, candidate: Candidate, weights: Mapping[str, "Tensor"]) -> Run:
    """Load a candidate on the plan's device.

    Args:
        plan: plan of the run.
        candidate: one of its candidates.
        weights: weights of the block; bundles contain their own.
    """
    import torch

    if candidate.bundle is not None:
        # The public runtime, since users also pay for its input checks and copies. Trust in the bundle was checked when
        # it was chosen.
        runtime = open_runtime(candidate.bundle, RunOptions(device=plan.device, threads=plan.threads, trust=True))
        return lambda inputs: runtime(**inputs)
    dtype = getattr(torch, plan.dtype)
    if candidate.is_softmax:
        softmax = SoftmaxAttention(plan.config, weights, max_positions=plan.max_positions, dtype=dtype)
        softmax = softmax.to(plan.device).eval()
        if candidate.impl == SOFTMAX_COMPILED:
            # Compiled once for each size, which is fastest; by default, torch refuses more than eight.
            limits = torch.compiler.config
            limits.recompile_limit = max(limits.recompile_limit, len(plan.sizes))
            softmax.compile(dynamic=False, fullgraph=True)
        return partial(run_graph, softmax)
    assert candidate.impl is not None
    block = block_class(plan.config).from_weights(
        plan.config, weights, impl=candidate.impl, max_positions=plan.max_positions, dtype=dtype
    )
    return partial(run_graph, block.to(plan.device))


def formula_of(
    plan: Plan, candidate: Candidate, weights: Mapping[str, "Tensor"]
) -> tuple[AnyConfig, Mapping[str, "Tensor"]]:
    """Config and weights with which the oracle computes the formula of a candidate."""
    if not candidate.is_softmax:
        return plan.config, weights
    return as_second_version(plan.config, weights)


def weight_bytes(candidate: Candidate, weights: Mapping[str, "Tensor"]) -> int:
    """Size of a candidate's weights alone."""
    # The softmax block has only the projections.
    counted = [tensor for name, tensor in weights.items() if not candidate.is_softmax or name.endswith("_proj.weight")]
    return sum(tensor.numel() * tensor.element_size() for tensor in counted)


def inputs_of(plan: Plan, config: AnyConfig, size: Size) -> dict[str, "Tensor"]:
    """Inputs of one size, drawn with a fixed seed and identical for all candidates of a config.

    Args:
        plan: plan of the run.
        config: config of the block, or of the softmax block from `formula_of`, whose cache has another shape.
        size: one of the plan's sizes.
    """
    case = Case(
        batch_size=size.batch_size,
        sequence_length=size.sequence_length,
        past_length=size.past_sequence_length,
        mask="left" if plan.graph == "masked" else "none",
        seed=plan.seed,
    )
    return {name: to_tensor(array) for name, array in case.inputs(_spec(plan, config)).items()}


def _spec(plan: Plan, config: AnyConfig) -> GraphSpec:
    return graph_spec(
        plan.graph,
        config,
        dtype=plan.dtype,
        max_batch_size=plan.max_batch_size,
        max_sequence_length=plan.max_sequence_length,
    )
