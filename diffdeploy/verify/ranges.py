"""How far into the declared ranges a sweep reaches, and how it spreads over them."""

from dataclasses import replace

import numpy as np

from diffdeploy.config import AnyConfig
from diffdeploy.verify.cases import Case

__all__ = ["MAX_ELEMENTS", "MAX_SCORES", "compared", "longest_decoding", "longest_run", "octaves"]

# Scores of all heads of one case: 128 MiB in fp32, and the eager block holds a few such tensors.
MAX_SCORES = 2**25
# Of the hidden states of one case: 128 MiB in fp32, too.
MAX_ELEMENTS = 2**25
# Scores of one call that an artifact may hold at once, 2 GiB in fp32: whatever is longer is named as not tried.
_MAX_SCORES_OF_A_RUN = 2**29
# Beyond so many positions some are compared: the whole square of scores costs more than it shows.
_COMPARED_WHOLE = 512
_NUM_QUERIES = 64


def longest_run(config: AnyConfig) -> int:
    """Positions of the longest sequence in one row that an artifact is run on, whatever is compared of it."""
    square = int((_MAX_SCORES_OF_A_RUN / (2 * config.num_heads)) ** 0.5)
    return max(1, min(square, MAX_ELEMENTS // config.embed_dim))


def longest_decoding(config: AnyConfig) -> int:
    """Tokens of the longest cache that an artifact is run on, with the new one."""
    return max(2, MAX_ELEMENTS // (config.num_kv_heads * (config.key_cache_dim + config.value_dim)))


def compared(config: AnyConfig, case: Case) -> Case:
    """The case as it is compared: whole, or some queries of it where scores of all would take too much."""
    total = case.past_length + case.sequence_length
    scores = 2 * config.num_heads * case.batch_size * case.sequence_length * total
    long = case.sequence_length > _COMPARED_WHOLE or scores > MAX_SCORES
    return replace(case, num_queries=_NUM_QUERIES) if long and case.sequence_length > 1 else case


def octaves(least: int, most: int, drawn: np.random.Generator) -> list[int]:
    """One number of each octave from ``least`` to ``most``, so that none is far from all."""
    starts = []
    while least <= most:
        starts.append(least)
        least *= 2
    return [int(drawn.integers(start, min(2 * start, most + 1))) for start in starts]
