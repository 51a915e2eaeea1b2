"""Counted operations of a block: those that its formula requires, whatever an implementation does."""

import math

from diffdeploy.bench.plan import Candidate, Size
from diffdeploy.config import AnyConfig

__all__ = ["FORMULA", "attention_flop", "block_flop", "num_pairs", "num_scores", "projection_flop"]

# Lines below every table.
FORMULA = (
    "computed by formula, where a multiply-add counts as two: the projections, plus 12 d per query-key pair and head",
    "for two-stream attention with values of width 2d (8 d for softmax attention with two heads and values of width",
    "d); S tokens after a past of P have S (S + 1) / 2 + S P causal pairs",
)


def num_pairs(config: AnyConfig, size: Size) -> int:
    """Pairs of a query and a visible key, in one head and one batch row; padding is not subtracted."""
    length, past = size.sequence_length, size.past_sequence_length
    if not config.causal:
        return length * size.total_sequence_length
    window = config.sliding_window
    if window is None:
        return length * past + length * (length + 1) // 2
    return sum(min(window, past + position + 1) for position in range(length))


def num_scores(config: AnyConfig, size: Size) -> int:
    """Elements of one stream's score matrices, over all batch rows and heads, including hidden pairs."""
    return size.batch_size * config.num_heads * size.sequence_length * size.total_sequence_length


def attention_flop(config: AnyConfig, size: Size, *, softmax: bool = False) -> int:
    """Operations of attention in all heads.

    A stream takes ``2 d`` per pair for a score and ``2 e`` for its share of the values, where ``e`` is their width: two
    streams with ``e = 2d`` take ``12 d`` per pair and head. The softmax block of equal size has two heads with
    ``e = d`` for each differential head, which take ``8 d``.
    """
    value_dim = config.head_dim if softmax else config.value_dim
    # Two streams, each with the products for its scores and for its values.
    per_pair = 2 * (2 * config.head_dim + 2 * value_dim)
    return size.batch_size * config.num_heads * num_pairs(config, size) * per_pair


def projection_flop(config: AnyConfig, size: Size) -> int:
    """Operations of the four projections.

    Each token takes ``2 D`` for each row of the q, k and v weights, and for each column of the output weight.
    """
    elements = sum(math.prod(shape) for name, shape in config.weight_shapes().items() if name.endswith("_proj.weight"))
    return 2 * size.batch_size * size.sequence_length * elements


def block_flop(config: AnyConfig, size: Size, candidate: Candidate) -> int:
    """Operations of a candidate's whole block."""
    return projection_flop(config, size) + attention_flop(config, size, softmax=candidate.is_softmax)
