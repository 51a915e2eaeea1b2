"""Which cases a verification runs: from the declared ranges of a graph, the hardest first."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Literal, get_args

import numpy as np

from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import AnyCase, Case, Kind, Mask

__all__ = ["Selection", "golden_cases", "largest_tried", "longest_case", "random_cases", "select_cases", "telling_case"]

Selection = Literal["quick", "full"] | int

# Primes, and powers of two with their neighbours, where the blocks of kernels begin and end.
_LENGTHS = (1, 2, 3, 7, 13, 31, 63, 64, 65, 127, 128, 129)
_SPECIAL_LENGTHS = (1, 7, 65)
_MASKED_LENGTHS = (2, 7, 65)
_PADDINGS: tuple[Mask, ...] = ("left", "right", "ragged", "hidden")
# Past and present: empty, one step, steps across powers of two, chunks.
_PASTS = ((0, 1), (0, 7), (1, 1), (5, 1), (64, 1), (63, 2), (31, 33), (128, 1))
# Token by token; a token between longer steps; a step that is shorter than the one before.
_CHUNKS = ((1, 1, 1, 1, 1), (4, 1, 4), (7, 2))
# Scores of all heads of one case: 128 MiB in fp32, and the eager block holds a few such tensors.
_MAX_SCORES = 2**25
# Of the hidden states of one case: 128 MiB in fp32, too.
_MAX_ELEMENTS = 2**25
_MAX_RANDOM_LENGTH = 300
# What real activations have, and a standard normal has not.
_VALUES: tuple[Kind, ...] = ("outliers", "offset", "scales", "zeros", "repeated")
# Rows of a batch, each with a mask of its own.
_MIXED_ROWS = 4
_MOST_ROWS = 8
# Lengths and pasts that are drawn from the whole range, beside those that are chosen.
_NUM_DRAWN = 4


def select_cases(selection: Selection, config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    """The cases of a graph.

    Args:
        selection: ``full``: lengths around powers of two and primes, both ends of both ranges, masks and pasts, the
            longest sequence and the largest batch that the sweep's memory allows; ``quick``: a dozen or so of them that
            try one thing each; a number: that many, ``quick`` first, then ``full``, then random sizes and kinds.
        config: of the block.
        spec: interface of the graph.
        seed: of the inputs.

    Raises:
        InputError: the number is not positive.
    """
    quick = [*golden_cases(spec, seed), *_quick(config, spec, seed)]
    # Short ranges make several cases the same one, which is run once.
    if selection == "quick":
        return list(dict.fromkeys(quick))
    ordered = list(dict.fromkeys([*quick, *_full(config, spec, seed)]))
    if selection == "full":
        return ordered
    if selection < 1:
        raise InputError(f"the number of cases is {selection}; accepted is 1 or more, quick or full")
    return [*ordered[:selection], *islice(random_cases(spec, seed), max(0, selection - len(ordered)))]


def longest_case(config: AnyConfig, *, decoding: bool = False) -> int:
    """Positions of the longest case whose tensors stay within the sweep's memory.

    Args:
        config: of the block.
        decoding: one token behind a cache, in place of a whole sequence.
    """
    # Two streams of every head, each with a square of scores.
    square = int((_MAX_SCORES / (2 * config.num_heads)) ** 0.5)
    fits = _MAX_ELEMENTS // config.embed_dim
    return max(1, fits if decoding else min(fits, square))


def largest_tried(cases: Iterable[AnyCase], spec: GraphSpec) -> dict[str, tuple[int, int]]:
    """By axis, the largest size that cases have, and the largest that the graph is declared for.

    Args:
        cases: of a verification; those that a user brought are inputs of their own, and no sweep.
        spec: interface of the graph.
    """
    length = "total_sequence_length" if "total_sequence_length" in spec.axes else "sequence_length"
    swept = [case for case in cases if isinstance(case, Case)]
    if not swept:
        return {}
    return {
        "batch_size": (max(case.batch_size for case in swept), spec.axes["batch_size"].max),
        length: (max(case.past_length + case.sequence_length for case in swept), spec.axes[length].max),
    }


def golden_cases(spec: GraphSpec, seed: int) -> list[Case]:
    """The few cases whose inputs and exact outputs travel with the bundle."""
    # Small, since inputs and outputs in fp64 are shipped with every bundle.
    length = min(7, spec.axes["sequence_length"].max)
    cases = [Case(batch_size=1, sequence_length=1, seed=seed), Case(batch_size=2, sequence_length=length, seed=seed)]
    if spec.variant != "plain":
        cases.append(replace(cases[1], mask="left"))
    if spec.variant == "cached":
        cases.append(Case(batch_size=2, sequence_length=1, past_length=min(5, length - 1), seed=seed, mask="left"))
    return cases


def _quick(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    longest = min(129, spec.axes["sequence_length"].max)
    length = min(65, longest)
    kinds: tuple[Kind, ...] = ("normal", "large", "constant", "tiny")
    cases = [Case(batch_size=1, sequence_length=length, seed=seed, kind=kind) for kind in kinds]
    cases += [
        Case(batch_size=1, sequence_length=longest, seed=seed),
        Case(batch_size=2, sequence_length=length, seed=seed, row_by_row=True),
    ]
    cases += [Case(batch_size=1, sequence_length=length, seed=seed, kind="outliers")]
    rows = min(_MIXED_ROWS, spec.axes["batch_size"].max)
    if spec.variant != "plain":
        cases += [Case(batch_size=2, sequence_length=length, seed=seed, mask=mask) for mask in _PADDINGS]
        cases += [Case(batch_size=rows, sequence_length=length, seed=seed, mask="mixed")]
    if spec.variant == "cached":
        past = longest // 2
        cases += [Case(batch_size=rows, sequence_length=1, past_length=past, seed=seed, mask="mixed")]
        cases += [
            Case(batch_size=2, sequence_length=1, past_length=past, seed=seed),
            Case(batch_size=2, sequence_length=longest - past, past_length=past, seed=seed, mask="ragged"),
        ]
        cases += _in_chunks(config, spec, seed, batch_sizes=(2,))[:2]
    return cases


def _full(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    cases = _plain(config, spec, seed)
    if spec.variant != "plain":
        cases += _masked(spec, seed)
    if spec.variant == "cached":
        cases += _cached(config, spec, seed)
    return cases


def _plain(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    lengths = [length for length in _LENGTHS if length <= max_length]
    longest = min(max_length, longest_case(config))
    short = min(3, max_length)
    widest = max(1, min(max_batch, _MAX_ELEMENTS // (short * config.embed_dim)))
    sizes = [(batch, length) for length in lengths for batch in (1, 2)] + [(widest, short), (1, max(1, longest))]
    sizes += [(batch, min(5, max_length)) for batch in range(3, min(_MOST_ROWS, max_batch) + 1)]
    sizes += [(1, length) for length in _drawn(longest, seed)]
    cases = [Case(batch_size=batch, sequence_length=length, seed=seed) for batch, length in sizes]
    cases += [
        Case(batch_size=2 if max_batch > 1 else 1, sequence_length=min(length, max_length), seed=seed, kind=kind)
        for kind in _VALUES
        for length in (13, 65)
    ]
    special: tuple[Kind, ...] = ("tiny", "large", "constant")
    return cases + [
        Case(batch_size=1, sequence_length=length, seed=seed, kind=kind)
        for kind in special
        for length in _SPECIAL_LENGTHS
        if length <= max_length
    ]


def _drawn(most: int, seed: int) -> list[int]:
    """Numbers up to ``most``, as many between 10 and 100 as between 100 and 1,000."""
    powers = np.random.default_rng([seed, most]).uniform(0.0, np.log(most + 1), _NUM_DRAWN)
    return [max(1, min(most, int(np.exp(power)))) for power in powers]


def _masked(spec: GraphSpec, seed: int) -> list[Case]:
    lengths = [length for length in _MASKED_LENGTHS if length <= spec.axes["sequence_length"].max]
    cases = [
        Case(batch_size=2, sequence_length=length, seed=seed, mask=mask) for mask in _PADDINGS for length in lengths
    ]
    # The last is the longest with a hidden row: alone, a batch of nothing but padding.
    cases += [replace(cases[-1], batch_size=1), replace(cases[-1], mask="left", kind="constant")]
    rows, most = (min(number, spec.axes["batch_size"].max) for number in (_MIXED_ROWS, _MOST_ROWS))
    mixed = [Case(batch_size=rows, sequence_length=length, seed=seed, mask="mixed") for length in lengths]
    mixed += [replace(mixed[-1], batch_size=most, sequence_length=min(13, spec.axes["sequence_length"].max))]
    if "position_ids" in spec.inputs:
        mixed += [replace(case, drawn_positions=True) for case in mixed]
    return [*cases, *mixed, *(replace(mixed[0], kind=kind, sequence_length=lengths[-1]) for kind in _VALUES)]


def _cached(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_total = spec.axes["total_sequence_length"].max
    # Two rows of two streams of every head.
    longest_step = min(max_total, max(1, _MAX_SCORES // (2 * 2 * config.num_heads * max_total)))
    pasts = [*_PASTS, (max_total - 1, 1), (max_total - longest_step, longest_step)]
    cases = [
        Case(batch_size=batch, sequence_length=length, past_length=past, seed=seed)
        for past, length in pasts
        for batch in (1, 2)
        if past + length <= max_total
    ]
    cases += [
        Case(batch_size=2, sequence_length=length, past_length=past, seed=seed, mask=mask)
        for past, length in ((5, 1), (31, 33))
        for mask in _PADDINGS
        if past + length <= max_total
    ]
    rows = min(_MIXED_ROWS, spec.axes["batch_size"].max)
    drawn = [(past, 1) for past in _drawn(max_total - 1, seed)]
    cases += [
        Case(batch_size=rows, sequence_length=length, past_length=past, seed=seed, mask="mixed")
        for past, length in (*_PASTS, *drawn)
        if past + length <= max_total
    ]
    past = min(13, max_total - 5)
    if past > 0:
        mixed = Case(batch_size=rows, sequence_length=5, past_length=past, seed=seed, mask="mixed")
        cases += [replace(mixed, kind=kind) for kind in _VALUES]
    return cases + _in_chunks(config, spec, seed, batch_sizes=(1, 2))


def _in_chunks(config: AnyConfig, spec: GraphSpec, seed: int, batch_sizes: tuple[int, ...]) -> list[Case]:
    if not config.causal:  # earlier steps would miss later tokens
        return []
    max_total = spec.axes["total_sequence_length"].max
    return [
        Case(batch_size=batch, sequence_length=sum(chunks), chunks=chunks, seed=seed)
        for chunks in _CHUNKS
        for batch in batch_sizes
        if sum(chunks) <= max_total
    ]


def random_cases(spec: GraphSpec, seed: int) -> Iterator[Case]:
    """Endless cases of any size up to a few hundred positions."""
    choose = np.random.default_rng(seed)
    kinds, masks = get_args(Kind), get_args(Mask)
    max_total = min(_MAX_RANDOM_LENGTH, spec.axes["sequence_length"].max)
    number = 0
    while True:
        number += 1
        batch_size = int(choose.integers(1, min(4, spec.axes["batch_size"].max) + 1))
        total = int(choose.integers(1, max_total + 1))
        past = int(choose.integers(0, total)) if spec.variant == "cached" else 0
        yield Case(
            batch_size=batch_size,
            sequence_length=total - past,
            past_length=past,
            kind=kinds[choose.integers(len(kinds))],
            mask="none" if spec.variant == "plain" else masks[choose.integers(len(masks))],
            seed=seed,
            number=number,
        )


def telling_case(spec: GraphSpec, seed: int) -> Case:
    """One case on which every stage does something, so that none can be taken for another."""
    longest = spec.axes["sequence_length"].max
    past = min(5, longest - 2) if spec.variant == "cached" else 0
    return Case(
        batch_size=2,
        sequence_length=min(7, longest - past),
        past_length=past,
        mask="none" if spec.variant == "plain" else "left",
        seed=seed,
    )
