"""Estimate of a run's memory before anything is allocated, so that the run cannot overload the machine."""

import math

from diffdeploy.bench.correctness import MAX_ORACLE_SCORES
from diffdeploy.bench.operations import num_scores
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.errors import UnavailableError
from diffdeploy.ops import Impl

__all__ = ["candidate_bytes", "fits_twice", "require_memory"]

# Number of score matrices of all heads in memory at once, in fp32, rounded up from docs/operator-speed.md. Other
# implementations keep none, since their kernels read the keys block by block.
_SCORE_MATRICES: dict[str, dict[str, float]] = {
    "cpu": {Impl.NAIVE: 4.2, Impl.TWO_CALL: 2.6, Impl.STACKED_WIDE: 5.0},
    "cuda": {Impl.NAIVE: 4.2},
}
# Number of tensors as large as the queries, from projections to output: `padded` has the most, 11 at a length of 2048.
_ACTIVATIONS = 12


def candidate_bytes(plan: Plan, candidate: Candidate, size: Size) -> int:
    """Memory of one call of a candidate, without its weights."""
    # A bundle needs as much as the implementation in its graph.
    matrices = _SCORE_MATRICES[plan.device].get(candidate.impl or candidate.bundle_impl or "", 0.0)
    return _activation_bytes(plan, size) + int(matrices * 4 * num_scores(plan.config, size))


def require_memory(plan: Plan, free_bytes: int) -> None:
    """Raise an error if a run needs too much memory.

    Args:
        plan: plan of the run.
        free_bytes: free memory of this machine.

    Raises:
        UnavailableError: a candidate needs more memory than is free.
    """
    for size in plan.sizes:
        # All candidates stay loaded while one of them runs, and the exact result is in memory as well.
        shared = _weight_bytes(plan) + _reference_bytes(plan, size)
        for candidate in plan.candidates:
            needed = shared + candidate_bytes(plan, candidate, size)
            if needed > free_bytes:
                raise UnavailableError(
                    f"{candidate.name} at {size.id} needs about {needed / 2**30:.3g} GiB, but {free_bytes / 2**30:.3g} "
                    "GiB are free here; give a smaller --seq or --batch, or omit it from --impl or --format"
                )


def fits_twice(plan: Plan, free_bytes: int) -> bool:
    """True if any two candidates can run side by side, at any size."""
    largest = max(candidate_bytes(plan, candidate, size) for candidate in plan.candidates for size in plan.sizes)
    return 2 * (largest + _weight_bytes(plan)) < free_bytes


def _activation_bytes(plan: Plan, size: Size) -> int:
    config = plan.config
    width = max(config.embed_dim, 2 * config.num_heads * config.head_dim)
    elements = _ACTIVATIONS * size.batch_size * size.sequence_length * width
    if plan.graph == "cached":  # cached keys and values are copied into the new cache
        per_token = config.num_key_streams * config.head_dim + config.num_kv_heads * config.value_dim
        elements += 2 * size.batch_size * size.total_sequence_length * per_token
    return elements * _item_bytes(plan)


def _weight_bytes(plan: Plan) -> int:
    """Weights of all candidates, loaded together; eager blocks share theirs, and a backend may keep a second copy."""
    elements = sum(math.prod(shape) for shape in plan.config.weight_shapes().values())
    num_bundles = sum(candidate.bundle is not None for candidate in plan.candidates)
    # 8 bytes per number for the oracle's fp64 copy.
    return elements * (8 + (1 + 2 * num_bundles) * _item_bytes(plan))


def _reference_bytes(plan: Plan, size: Size) -> int:
    """Memory of the exact result: activations in fp64, and scores if the oracle computes it."""
    scores = num_scores(plan.config, size)
    naive = int(_SCORE_MATRICES["cpu"][Impl.NAIVE] * 4 * scores) if scores <= MAX_ORACLE_SCORES else 0
    return 2 * _activation_bytes(plan, size) * 8 // _item_bytes(plan) + naive


def _item_bytes(plan: Plan) -> int:
    return 4 if plan.dtype == "float32" else 2
