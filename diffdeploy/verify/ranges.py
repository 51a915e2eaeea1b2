"""How far the sweeps of blocks and of models reach into the declared ranges, and how their cases are distributed."""

from dataclasses import replace

import numpy as np

from diffdeploy.config import AnyConfig
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case, Mask

__all__ = [
    "EVERY_BATCH",
    "MAX_ELEMENTS",
    "MAX_SCORES",
    "PADDINGS",
    "compared",
    "in_chunks",
    "log_uniform",
    "longest_decoding",
    "longest_run",
    "octaves",
]

# Masks of the last row, while the other rows have none.
PADDINGS: tuple[Mask, ...] = ("left", "right", "ragged", "hidden")
# Every batch size up to this one is tried, and a few larger ones.
EVERY_BATCH = 8
# Steps of chunked cases: token by token; a token between longer steps; a step shorter than the previous one.
_CHUNKS = ((1, 1, 1, 1, 1), (4, 1, 4), (7, 2))

# Maximum number of scores of all heads in one case: 128 MiB in fp32; the eager block needs a few such tensors.
MAX_SCORES = 2**25
# Maximum number of elements in the hidden states of one case: also 128 MiB in fp32.
MAX_ELEMENTS = 2**25
# Maximum number of scores in memory in one call of an artifact, 2 GiB in fp32; longer inputs are reported as untried.
_MAX_SCORES_OF_A_RUN = 2**29
# Above this many positions, only some are compared: computing all scores would take long, and reveal little more.
_COMPARED_WHOLE = 512
_NUM_QUERIES = 64


def longest_run(config: AnyConfig) -> int:
    """Number of positions of the longest sequence, in one row, that an artifact is run on, compared or not."""
    square = int((_MAX_SCORES_OF_A_RUN / (2 * config.num_heads)) ** 0.5)
    return max(1, min(square, MAX_ELEMENTS // config.embed_dim))


def longest_decoding(config: AnyConfig) -> int:
    """Number of tokens of the longest cache that an artifact is run on, including the new one."""
    return max(2, MAX_ELEMENTS // (config.num_kv_heads * (config.key_cache_dim + config.value_dim)))


def compared(config: AnyConfig, case: Case) -> Case:
    """Choose the part of a case that is compared: all, or some queries if the scores of all would be too many."""
    total = case.past_length + case.sequence_length
    scores = 2 * config.num_heads * case.batch_size * case.sequence_length * total
    long = case.sequence_length > _COMPARED_WHOLE or scores > MAX_SCORES
    return replace(case, num_queries=_NUM_QUERIES) if long and case.sequence_length > 1 else case


def octaves(least: int, most: int, drawn: np.random.Generator) -> list[int]:
    """Draw one number per octave from ``least`` to ``most``, which leaves no number in between far from a drawn one."""
    starts = []
    while least <= most:
        starts.append(least)
        least *= 2
    return [int(drawn.integers(start, min(2 * start, most + 1))) for start in starts]


def log_uniform(choose: np.random.Generator, most: int) -> int:
    """Draw a number up to ``most``, as often between 10 and 100 as between 100 and 1,000."""
    return min(most, int(np.exp(choose.uniform(0.0, np.log(most + 1)))))


def in_chunks(spec: GraphSpec, seed: int, batch_sizes: tuple[int, ...]) -> list[Case]:
    """Cases whose sequences are fed in steps, each with the cache of the previous one."""
    max_total = spec.axes["total_sequence_length"].max
    return [
        Case(batch_size=batch, sequence_length=sum(chunks), chunks=chunks, seed=seed)
        for chunks in _CHUNKS
        for batch in batch_sizes
        if sum(chunks) <= max_total
    ]
