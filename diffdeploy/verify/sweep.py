"""The cases for verifying a block: chosen from the declared ranges of a graph, the most difficult first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import get_args

import numpy as np

from diffdeploy.config import AnyConfig, AnyModel, DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.formats import Selection
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case, Kind, Mask
from diffdeploy.verify.model_sweep import full_model_cases, quick_model_cases, random_model_cases
from diffdeploy.verify.ranges import (
    EVERY_BATCH,
    MAX_ELEMENTS,
    MAX_SCORES,
    PADDINGS,
    compared,
    in_chunks,
    log_uniform,
    longest_decoding,
    longest_run,
    octaves,
)

__all__ = ["golden_cases", "longest_case", "random_cases", "select_cases", "telling_case"]

# Primes, and powers of two with their neighbours, where the blocks of kernels begin and end.
_LENGTHS = (1, 2, 3, 7, 13, 31, 63, 64, 65, 127, 128, 129)
_SPECIAL_LENGTHS = (1, 7, 65)
_MASKED_LENGTHS = (2, 7, 65)
# Numbers of past and new tokens: an empty past, one step, steps across powers of two, chunks.
_PASTS = ((0, 1), (0, 7), (1, 1), (5, 1), (64, 1), (63, 2), (31, 33), (128, 1))
# Kinds that resemble the activations of models, or are more difficult. Each is tried at two lengths: at the longer one,
# the scales of `scales` are close enough together to reveal faults in a narrow range of magnitudes.
_KINDS: tuple[Kind, ...] = ("zeros", "repeated", "offset", "outliers", "heavy", "scales", "nan", "infinity")
_KIND_LENGTHS = (7, 65)
# Lengths of cases with eight rows each. The scales of a case go from 1e-6 to 1e4; those of all four cases together are
# about a factor of 2 apart.
_SCALED_LENGTHS = (1, 3, 7, 33)
_NUM_RANDOM = 12
_MAX_RANDOM_BATCH, _MAX_RANDOM_TOKENS = 8, 2048
_SHARE_WITH_A_PAST, _SHARE_WITH_DRAWN_POSITIONS = 0.5, 0.25


def select_cases(selection: Selection, config: AnyModel, spec: GraphSpec, seed: int) -> list[Case]:
    """Choose the cases of a graph.

    Args:
        selection: ``full`` for every batch size up to 8 and the largest one, fixed lengths and pasts and one random one
            per octave of their ranges, masks that differ from row to row, numbers of every kind, and a dozen random
            cases; ``quick`` for about a dozen that try one thing each; a number for that many, ``quick`` first, then
            ``full``, then more random ones.
        config: config of the block.
        spec: interface of the graph.
        seed: random seed for the inputs.

    Raises:
        InputError: the number is not positive.
    """
    quick, full, drawn = _parts(config, spec, seed)
    quick = [*golden_cases(spec, seed), *quick]
    # With short ranges, several cases are identical and are run only once.
    if selection == "quick":
        return list(dict.fromkeys(quick))
    ordered = list(dict.fromkeys([*quick, *full, *islice(drawn, _NUM_RANDOM)]))
    if selection == "full":
        return ordered
    if selection < 1:
        raise InputError(f"the number of cases is {selection}; accepted: 1 or more, quick or full")
    return [*ordered[:selection], *islice(drawn, max(0, selection - len(ordered)))]


def _parts(config: AnyModel, spec: GraphSpec, seed: int) -> tuple[list[Case], list[Case], Iterator[Case]]:
    """Quick cases, the additional ones of a full sweep, and an iterator of random ones that never ends."""
    if isinstance(config, DecoderConfig):
        quick, full = quick_model_cases(spec, seed), full_model_cases(spec, config, seed)
        return quick, full, random_model_cases(spec, config, seed)
    return _quick(config, spec, seed), _full(config, spec, seed), random_cases(config, spec, seed)


def longest_case(config: AnyConfig, *, decoding: bool = False) -> int:
    """Number of positions of the longest case that is compared completely within the sweep's memory.

    Args:
        config: config of the block.
        decoding: true for one token after a cache, false for a whole sequence.
    """
    # Both streams of every head have a square matrix of scores.
    square = int((MAX_SCORES / (2 * config.num_heads)) ** 0.5)
    fits = MAX_ELEMENTS // config.embed_dim
    return max(1, fits if decoding else min(fits, square))


def golden_cases(spec: GraphSpec, seed: int) -> list[Case]:
    """The few cases whose inputs and exact outputs are part of the bundle."""
    # Small, since their inputs and outputs in fp64 are shipped with every bundle.
    length = min(7, spec.axes["sequence_length"].max)
    cases = [Case(batch_size=1, sequence_length=1, seed=seed), Case(batch_size=2, sequence_length=length, seed=seed)]
    if spec.variant != "plain":
        cases.append(replace(cases[1], mask="left"))
    if spec.caches:
        cases.append(Case(batch_size=2, sequence_length=1, past_length=min(5, length - 1), seed=seed, mask="left"))
    return cases


def _quick(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, longest = spec.axes["batch_size"].max, min(129, spec.axes["sequence_length"].max)
    length, short, mask = min(65, longest), min(7, longest), _mixed(spec)
    kinds: tuple[Kind, ...] = ("normal", "large", "constant", "tiny", "outliers")
    cases = [Case(batch_size=1, sequence_length=length, seed=seed, kind=kind) for kind in kinds]
    cases += [
        Case(batch_size=1, sequence_length=longest, seed=seed),
        Case(batch_size=2, sequence_length=length, seed=seed, row_by_row=True),
        Case(batch_size=min(8, max_batch), sequence_length=short, seed=seed, kind="scaled"),
    ]
    if spec.variant != "plain":
        cases += [Case(batch_size=2, sequence_length=short, seed=seed, mask=mask) for mask in PADDINGS]
        cases.append(Case(batch_size=min(4, max_batch), sequence_length=length, seed=seed, mask=mask))
        cases += [replace(cases[-1], sequence_length=short, positions="drawn")] if _positions(spec) else []
    if spec.variant == "cached":
        past = longest // 2
        cases += [
            Case(batch_size=min(3, max_batch), sequence_length=1, past_length=past, seed=seed, mask=mask),
            Case(batch_size=2, sequence_length=longest - past, past_length=past, seed=seed, mask="ragged"),
        ]
        cases += _steps(config, spec, seed, (2,))[:2]
    return cases


def _mixed(spec: GraphSpec) -> Mask:
    """Mask that differs from row to row, if the graph takes one."""
    return "none" if spec.variant == "plain" else "mixed"


def _positions(spec: GraphSpec) -> bool:
    return "position_ids" in spec.inputs


def _full(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    cases = [*_lengths(config, spec, seed), *_batches(config, spec, seed), *_kinds(spec, seed)]
    if spec.variant != "plain":
        cases += _masked(spec, seed)
    if spec.variant == "cached":
        cases += _cached(config, spec, seed)
    return cases


def _lengths(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    lengths = [length for length in _LENGTHS if length <= max_length]
    # Batches have separate cases, so that each length is run once.
    cases = [
        Case(batch_size=min(1 + number % 2, max_batch), sequence_length=length, seed=seed)
        for number, length in enumerate(lengths)
    ]
    drawn = np.random.default_rng([seed, 0])
    longest = min(max_length, longest_run(config))
    # With padding if the graph takes a mask, and in one row, since memory limits these cases.
    cases += [
        compared(config, Case(batch_size=1, sequence_length=length, seed=seed, mask=_mixed(spec)))
        for length in octaves(8, longest, drawn)
    ]
    return [*cases, compared(config, Case(batch_size=1, sequence_length=longest, seed=seed))]


def _batches(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    """Every batch size up to 8 and a few larger ones, each after a different past, with a mask per row if possible."""
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    drawn = np.random.default_rng([seed, 1])
    sizes = [*range(3, min(EVERY_BATCH, max_batch) + 1), *octaves(EVERY_BATCH + 1, max_batch, drawn), max_batch]
    cases = []
    for size in sizes:
        length = int(drawn.integers(1, min(9, max_length) + 1))
        while length > 1 and size * length * config.embed_dim > MAX_ELEMENTS:
            length -= 1
        case = Case(batch_size=size, sequence_length=length, seed=seed, mask=_mixed(spec), repeats=size > EVERY_BATCH)
        cases.append(case)
        if spec.variant == "cached":
            past = int(drawn.integers(1, min(33, max_length)))
            cases.append(replace(case, sequence_length=1, past_length=past))
    return cases


def _kinds(spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    special: tuple[Kind, ...] = ("tiny", "large", "constant")
    cases = [
        Case(batch_size=1, sequence_length=length, seed=seed, kind=kind)
        for kind in special
        for length in _SPECIAL_LENGTHS
        if length <= max_length
    ]
    for length in (length for length in _KIND_LENGTHS if length <= max_length):
        for kind in _KINDS:
            # Short sequences follow a past, if the graph takes one.
            past = min(9, max_length - length) if spec.variant == "cached" and length == _KIND_LENGTHS[0] else 0
            cases.append(
                Case(batch_size=min(3, max_batch), sequence_length=length, past_length=past, seed=seed, kind=kind,
                     mask=_mixed(spec))
            )  # fmt: skip
    rows = min(EVERY_BATCH, max_batch)
    return cases + [
        Case(
            batch_size=rows,
            sequence_length=length,
            seed=seed,
            kind="scaled",
            mask=_mixed(spec) if length > 1 else "none",
        )
        for length in _SCALED_LENGTHS
        if length <= max_length
    ]


def _masked(spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    lengths = [length for length in _MASKED_LENGTHS if length <= max_length]
    cases = [
        Case(batch_size=2, sequence_length=length, seed=seed, mask=mask) for mask in PADDINGS for length in lengths
    ]
    # The last case is the longest one with a hidden row. With a single row, its batch consists of padding only.
    cases += [replace(cases[-1], batch_size=1), replace(cases[-1], mask="left", kind="constant")]
    mixed = [
        Case(batch_size=min(batch, max_batch), sequence_length=length, seed=seed, mask="mixed")
        for batch, length in ((8, 13), (8, 33), (4, 64), (3, 129))
        if length <= max_length
    ]
    if _positions(spec):
        mixed += [replace(case, positions="drawn") for case in mixed[:2]]
    return cases + mixed


def _cached(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_total, max_batch = spec.axes["total_sequence_length"].max, spec.axes["batch_size"].max
    cases = [
        Case(batch_size=1 + number % 2, sequence_length=length, past_length=past, seed=seed)
        for number, (past, length) in enumerate(_PASTS)
        if past + length <= max_total
    ]
    cases += [
        Case(batch_size=2, sequence_length=length, past_length=past, seed=seed, mask=mask)
        for past, length in ((5, 1), (31, 33))
        for mask in PADDINGS
        if past + length <= max_total
    ]
    return cases + _long_pasts(config, spec, seed, max_batch) + _steps(config, spec, seed, (1, 2))


def _long_pasts(config: AnyConfig, spec: GraphSpec, seed: int, max_batch: int) -> list[Case]:
    """Padded pasts of every octave, followed by one token or by several."""
    max_total = spec.axes["total_sequence_length"].max
    longest, drawn = min(max_total, longest_decoding(config)), np.random.default_rng([seed, 2])
    cases: list[Case] = []
    for number, past in enumerate((*octaves(2, longest - 1, drawn), longest - 1)):
        # A batch of one row is a special case, so it occurs as often as larger ones.
        batch = 1 if number % 2 else min(3, max_batch)
        case = Case(batch_size=batch, sequence_length=1, past_length=past, seed=seed, mask="mixed")
        cases.append(case)
        room = max(1, min(max_total - past, longest_run(config) ** 2 // (past + 1)))
        steps = octaves(2, min(room, past), drawn)
        if steps:
            length = steps[int(drawn.integers(len(steps)))]
            cases.append(compared(config, replace(case, batch_size=1, sequence_length=length)))
    return [*cases, replace(cases[-1], mask="none", batch_size=min(2, max_batch), sequence_length=1)]


def _steps(config: AnyConfig, spec: GraphSpec, seed: int, batch_sizes: tuple[int, ...]) -> list[Case]:
    # Without causality, a token attends to later tokens, which earlier steps do not have.
    return in_chunks(spec, seed, batch_sizes) if config.causal else []


def random_cases(config: AnyConfig, spec: GraphSpec, seed: int) -> Iterator[Case]:
    """Yield cases of any kind without end, with log-uniform sizes over the declared ranges."""
    choose = np.random.default_rng(seed)
    kinds, masks = get_args(Kind), get_args(Mask)
    longest = min(spec.axes["sequence_length"].max, longest_run(config))
    number = 0

    while True:
        number += 1
        total = log_uniform(choose, longest)
        rows = min(_MAX_RANDOM_BATCH, spec.axes["batch_size"].max, max(1, _MAX_RANDOM_TOKENS // total))
        has_past = spec.variant == "cached" and choose.random() < _SHARE_WITH_A_PAST
        past = min(total - 1, log_uniform(choose, total)) if has_past else 0
        case = Case(
            batch_size=log_uniform(choose, rows),
            sequence_length=total - past,
            past_length=past,
            kind=kinds[choose.integers(len(kinds))],
            mask="none" if spec.variant == "plain" else masks[choose.integers(len(masks))],
            positions="drawn" if _positions(spec) and choose.random() < _SHARE_WITH_DRAWN_POSITIONS else "counted",
            seed=seed,
            number=number,
        )
        yield compared(config, case)


def telling_case(spec: GraphSpec, seed: int) -> Case:
    """A case in which every stage has an effect, so that the stages can be distinguished."""
    longest = spec.axes["sequence_length"].max
    past = min(5, longest - 2) if spec.variant == "cached" else 0
    return Case(
        batch_size=2,
        sequence_length=min(7, longest - past),
        past_length=past,
        mask="none" if spec.variant == "plain" else "left",
        seed=seed,
    )
