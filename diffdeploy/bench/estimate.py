"""How much memory a run will need, guessed before anything is allocated, so that no machine is brought to its knees."""

import math

from diffdeploy.bench.correctness import MAX_ORACLE_SCORES
from diffdeploy.bench.operations import num_scores
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.errors import UnavailableError
from diffdeploy.ops import Impl

__all__ = ["candidate_bytes", "fits_twice", "require_memory"]

# Score matrices of all heads that live at once, in fp32, rounded up from docs/operator-speed.md. Implementations that
# are not named keep none: their kernels go through the keys block by block.
_SCORE_MATRICES: dict[str, dict[str, float]] = {
    "cpu": {Impl.NAIVE: 4.2, Impl.TWO_CALL: 2.6, Impl.STACKED_WIDE: 5.0},
    "cuda": {Impl.NAIVE: 4.2},
}
# Tensors as large as the queries, from the projections to the output: `padded` has most, 11 at a length of 2048.
_ACTIVATIONS = 12


def candidate_bytes(plan: Plan, candidate: Candidate, size: Size) -> int:
    """Memory that one call of a candidate takes beside its weights."""
    # A bundle keeps what the implementation that its graph was written with keeps.
    matrices = _SCORE_MATRICES[plan.device].get(candidate.impl or candidate.bundle_impl or "", 0.0)
    return _activation_bytes(plan, size) + int(matrices * 4 * num_scores(plan.config, size))


def require_memory(plan: Plan, free_bytes: int) -> None:
    """Refuse what will not fit.

    Args:
        plan: what is measured.
        free_bytes: what this machine has.

    Raises:
        UnavailableError: a candidate needs more than there is.
    """
    for size in plan.sizes:
        # All candidates stay loaded while one of them runs, and the exact result is held meanwhile.
        shared = _weight_bytes(plan) + _reference_bytes(plan, size)
        for candidate in plan.candidates:
            needed = shared + candidate_bytes(plan, candidate, size)
            if needed > free_bytes:
                raise UnavailableError(
                    f"{candidate.name} at {size.id} needs about {needed / 2**30:.3g} GiB, and {free_bytes / 2**30:.3g} "
                    "GiB are free here; give a smaller --seq or --batch, or leave it out with --impl or --format"
                )


def fits_twice(plan: Plan, free_bytes: int) -> bool:
    """Whether any two candidates can be run side by side, at any size."""
    largest = max(candidate_bytes(plan, candidate, size) for candidate in plan.candidates for size in plan.sizes)
    return 2 * (largest + _weight_bytes(plan)) < free_bytes


def _activation_bytes(plan: Plan, size: Size) -> int:
    config = plan.config
    width = max(config.embed_dim, 2 * config.num_heads * config.head_dim)
    elements = _ACTIVATIONS * size.batch_size * size.sequence_length * width
    if plan.graph == "cached":  # keys and values of the past are copied to the present
        per_token = config.num_key_streams * config.head_dim + config.num_kv_heads * config.value_dim
        elements += 2 * size.batch_size * size.total_sequence_length * per_token
    return elements * _item_bytes(plan)


def _weight_bytes(plan: Plan) -> int:
    """Of all candidates, which are loaded together; eager blocks share theirs, and a backend may keep a second copy."""
    elements = sum(math.prod(shape) for shape in plan.config.weight_shapes().values())
    num_bundles = sum(candidate.bundle is not None for candidate in plan.candidates)
    # 8 bytes for the oracle's fp64 copy.
    return elements * (8 + (1 + 2 * num_bundles) * _item_bytes(plan))


def _reference_bytes(plan: Plan, size: Size) -> int:
    """The exact result: activations in fp64, and scores as long as the oracle is asked."""
    scores = num_scores(plan.config, size)
    naive = int(_SCORE_MATRICES["cpu"][Impl.NAIVE] * 4 * scores) if scores <= MAX_ORACLE_SCORES else 0
    return 2 * _activation_bytes(plan, size) * 8 // _item_bytes(plan) + naive


def _item_bytes(plan: Plan) -> int:
    return 4 if plan.dtype == "float32" else 2
