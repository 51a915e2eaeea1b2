"""The cases for verifying a whole model: tokens, masks and caches over the declared ranges."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np

from diffdeploy.config import DecoderConfig
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case, Kind, Mask
from diffdeploy.verify.ranges import EVERY_BATCH, PADDINGS, in_chunks, log_uniform, octaves

__all__ = ["full_model_cases", "layer_case", "quick_model_cases", "random_model_cases"]

_LENGTHS = (1, 2, 3, 7, 13, 31, 64, 65, 129)
_KINDS: tuple[Kind, ...] = ("constant", "repeated")
# Maximum number of fp64 products in the formula of one case, which determine the cost of a long case.
_MAX_PRODUCTS = 2e11
# Maximum number of elements in the caches of one case: 256 MiB in fp32; the formula needs them in fp64.
_MAX_CACHED = 2**26
_LONG_BATCH = 3
# Number of rows, of all tokens, of tokens that are decoded one by one, and the padding of the prompts.
_DECODED: tuple[tuple[int, int, int, Mask], ...] = (
    (1, 2, 1, "none"), (1, 40, 12, "none"), (8, 9, 3, "left"), (2, 129, 12, "left"),
)  # fmt: skip


def longest_model_case(config: DecoderConfig) -> int:
    """Number of new tokens of the longest case whose formula is within `_MAX_PRODUCTS`."""
    return max(1, int(_MAX_PRODUCTS / sum(prod(shape) for shape in config.weight_shapes().values())))


def _longest_past(config: DecoderConfig, batch_size: int) -> int:
    block = config.attention
    width = block.num_kv_heads * (block.key_cache_dim + block.value_dim)
    return max(1, _MAX_CACHED // (config.num_layers * width * batch_size))


def quick_model_cases(spec: GraphSpec, seed: int) -> list[Case]:
    """One case for each kind of possible fault."""
    longest, rows = min(33, spec.axes["sequence_length"].max), spec.axes["batch_size"].max
    length, past = min(17, longest), longest // 2
    cases = [
        Case(batch_size=1, sequence_length=longest, seed=seed),
        Case(batch_size=2, sequence_length=length, seed=seed, row_by_row=True),
        *(Case(batch_size=2, sequence_length=min(7, longest), seed=seed, mask=mask) for mask in PADDINGS),
        Case(batch_size=min(4, rows), sequence_length=length, seed=seed, mask="mixed"),
        Case(batch_size=min(3, rows), sequence_length=1, past_length=past, seed=seed, mask="mixed"),
        Case(batch_size=2, sequence_length=longest - past, past_length=past, seed=seed, mask="ragged"),
        *in_chunks(spec, seed, (2,))[:2],
        Case(batch_size=min(3, rows), sequence_length=length, seed=seed, mask="left", decoded=length // 3),
    ]
    if "position_ids" in spec.inputs:
        cases.append(Case(batch_size=2, sequence_length=min(7, longest), seed=seed, mask="mixed", positions="drawn"))
    return cases


def full_model_cases(spec: GraphSpec, config: DecoderConfig, seed: int) -> list[Case]:
    """Every batch size up to 8 and the largest one; lengths and pasts from every octave that the formula can reach."""
    max_length, max_batch = spec.axes["sequence_length"].max, spec.axes["batch_size"].max
    longest, drawn = min(max_length, longest_model_case(config)), np.random.default_rng([seed, 3])
    cases = [
        Case(batch_size=1 + number % 2, sequence_length=length, seed=seed)
        for number, length in enumerate(_LENGTHS)
        if length <= longest
    ]
    cases += [
        Case(batch_size=1, sequence_length=length, seed=seed, mask="mixed") for length in octaves(16, longest, drawn)
    ]
    cases.append(Case(batch_size=1, sequence_length=longest, seed=seed))
    for size in (*range(3, min(EVERY_BATCH, max_batch) + 1), max_batch):
        length = max(1, min(int(drawn.integers(2, 8)), longest // size))
        case = Case(batch_size=size, sequence_length=length, seed=seed, mask="mixed")
        cases += [case, replace(case, sequence_length=1, past_length=min(9, max_length - 1))]
    cases += [Case(batch_size=2, sequence_length=min(7, longest), seed=seed, kind=kind) for kind in _KINDS]
    cases += [
        Case(batch_size=2, sequence_length=1, past_length=min(5, max_length - 1), seed=seed, mask=mask)
        for mask in PADDINGS
    ]
    cases += _pasts(spec, config, seed, drawn)
    # The last token of every prompt is never padding: nothing is generated after a prompt of padding only.
    decoded = [
        Case(batch_size=batch, sequence_length=length, seed=seed, decoded=decoded, mask=mask)
        for batch, length, decoded, mask in _DECODED
        if length <= longest and batch <= max_batch
    ]
    return [*cases, *in_chunks(spec, seed, (1, 2)), *decoded]


def _pasts(spec: GraphSpec, config: DecoderConfig, seed: int, drawn: np.random.Generator) -> list[Case]:
    """Cases of one new token, and of a few, with a cache length from every octave."""
    longest = min(spec.axes["total_sequence_length"].max, _longest_past(config, 1))
    cases = []
    for number, past in enumerate((*octaves(2, longest - 1, drawn), longest - 1)):
        fits = past * _LONG_BATCH <= _longest_past(config, 1)
        batch = min(_LONG_BATCH, spec.axes["batch_size"].max) if number % 2 and fits else 1
        cases.append(Case(batch_size=batch, sequence_length=1, past_length=past, seed=seed, mask="mixed"))
        room = min(longest - past, 8)
        if room > 1:
            cases.append(Case(batch_size=1, sequence_length=room, past_length=past, seed=seed))
    return cases


def random_model_cases(spec: GraphSpec, config: DecoderConfig, seed: int) -> Iterator[Case]:
    """Yield cases without end, with log-uniform sizes that the formula can reach."""
    choose = np.random.default_rng(seed)
    masks: tuple[Mask, ...] = ("none", *PADDINGS, "mixed")
    kinds: tuple[Kind, ...] = ("normal", *_KINDS)
    longest = min(spec.axes["sequence_length"].max, longest_model_case(config))

    for number in range(1, 1_000_000_000):
        total = log_uniform(choose, longest)
        past = min(total - 1, log_uniform(choose, total)) if choose.random() < 0.5 else 0  # noqa: PLR2004 - half of them
        yield Case(
            batch_size=log_uniform(choose, max(1, min(EVERY_BATCH, spec.axes["batch_size"].max, longest // total))),
            sequence_length=total - past,
            past_length=past,
            kind=kinds[choose.integers(len(kinds))],
            mask=masks[choose.integers(len(masks))],
            seed=seed,
            number=number,
        )


def layer_case(spec: GraphSpec, seed: int) -> Case:
    """The case on which the layers of a model are judged.

    Args:
        spec: interface of the graph.
        seed: random seed for the tokens.
    """
    longest = spec.axes["sequence_length"].max
    past = min(5, longest - 2)
    case = Case(batch_size=2, sequence_length=min(17, longest - past), past_length=past, mask="left", seed=seed)
    if spec.padding != "anywhere":
        # The graph is observed directly, without the runtime's adaptation of padding.
        case = replace(case, batch_size=1, mask="none")
    return case
