"""The inputs that an artifact is tried on: chosen from the declared ranges, seeded, with readable names."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyConfig
from diffdeploy.graphs import GraphSpec

__all__ = ["Case", "Kind", "Mask", "golden_cases", "sweep"]

Kind = Literal["normal", "tiny", "large", "constant"]
Mask = Literal["none", "left", "right", "ragged", "hidden"]

_LENGTHS = (1, 2, 3, 7, 13, 31, 63, 64, 65, 127, 128, 129)
_SPECIAL_LENGTHS = (1, 7, 65)
_MASKED_LENGTHS = (2, 7, 65)
# Past and present: empty, one step, steps across powers of two, chunks.
_PASTS = ((0, 1), (0, 7), (1, 1), (5, 1), (64, 1), (63, 2), (31, 33), (128, 1))
_CHUNKS = ((1, 1, 1, 1, 1), (4, 1, 4), (7, 2))
# Scores of all heads of one case: 128 MiB in fp32, and the eager block holds a few such tensors.
_MAX_SCORES = 2**25
_MAX_ELEMENTS = 2**25


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. The ``kind`` and the ``mask`` say what it is hard for.

    Attributes:
        batch_size: rows.
        sequence_length: positions.
        kind: ``normal`` N(0, 1); ``tiny`` N(0, 1e-6), where the norm's epsilon rules; ``large`` N(0, 64), where the
            softmax saturates; ``constant`` the same vector at every position, where only the mask and the rotary
            embedding tell positions apart.
        mask: padding of the last row: ``none``, at the ``left``, at the ``right``, ``ragged`` in between; ``hidden`` is
            a row of nothing else.
        past_length: tokens in the cache.
        chunks: lengths of the calls that the sequence is fed in, each with the cache of the one before; together they
            must give what one pass gives. Empty for a single call.
        seed: of the generator, together with all the above.
    """

    batch_size: int
    sequence_length: int
    seed: int
    kind: Kind = "normal"
    mask: Mask = "none"
    past_length: int = 0
    chunks: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """Name in reports, such as ``B2-S65-normal`` or ``B2-P63-S2-left-normal``."""
        parts = [f"B{self.batch_size}"]
        parts += [f"P{self.past_length}"] if self.past_length else []
        parts += [f"S{self.sequence_length}"]
        parts += [f"in-{'+'.join(map(str, self.chunks))}"] if self.chunks else []
        parts += [] if self.mask == "none" else [self.mask]
        return "-".join((*parts, self.kind))

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:
        """The inputs of a single call, by name, as ``spec`` wants them."""
        kinds, masks = get_args(Kind), get_args(Mask)
        numbers = (self.batch_size, self.sequence_length, self.past_length)
        generator = np.random.default_rng([self.seed, *numbers, kinds.index(self.kind), masks.index(self.mask)])
        hidden = spec.inputs["hidden_states"]
        rows = 1 if self.kind == "constant" else self.sequence_length
        values = generator.standard_normal((self.batch_size, rows, int(hidden.shape[-1])), dtype=np.float32)
        values *= {"normal": 1.0, "tiny": 1e-3, "large": 8.0, "constant": 1.0}[self.kind]
        inputs = {"hidden_states": np.repeat(values, self.sequence_length // rows, axis=1).astype(hidden.dtype)}
        if "attention_mask" in spec.inputs:
            tokens = self._tokens()
            inputs["attention_mask"] = tokens
            if "position_ids" in spec.inputs:
                positions = np.maximum(tokens.cumsum(axis=1) - 1, 0)
                inputs["position_ids"] = np.ascontiguousarray(positions[:, self.past_length :])
        for name in ("past_key_values.key", "past_key_values.value"):
            if name in spec.inputs:
                _, heads, _, width = spec.inputs[name].shape
                shape = (self.batch_size, int(heads), self.past_length, int(width))
                inputs[name] = generator.standard_normal(shape, dtype=np.float32).astype(spec.inputs[name].dtype)
        return inputs

    def _tokens(self) -> Array:
        total = self.past_length + self.sequence_length
        tokens = np.ones((self.batch_size, total), dtype=np.int64)
        half = max(1, total // 2)
        if self.mask == "left":
            tokens[-1, :half] = 0
        elif self.mask == "right":
            tokens[-1, total - half :] = 0
        elif self.mask == "ragged":
            tokens[-1, ::3] = 0
        elif self.mask == "hidden":
            tokens[-1] = 0
        return tokens


def sweep(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    """The cases of a graph: lengths around powers of two and primes, both ends of both ranges, masks and pasts.

    The longest sequence and the largest batch are the largest declared ones that this sweep's memory allows.
    """
    cases = _plain(config, spec, seed)
    if spec.variant != "plain":
        cases += _masked(spec, seed)
    if spec.variant == "cached":
        cases += _cached(config, spec, seed)
    return list(dict.fromkeys(cases))


def _plain(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    lengths = [length for length in _LENGTHS if length <= max_length]
    longest = min(max_length, int((_MAX_SCORES / (2 * config.num_heads)) ** 0.5), _MAX_ELEMENTS // config.embed_dim)
    short = min(3, max_length)
    widest = max(1, min(max_batch, _MAX_ELEMENTS // (short * config.embed_dim)))
    sizes = [(batch, length) for length in lengths for batch in (1, 2)] + [(widest, short), (1, max(1, longest))]
    cases = [Case(batch_size=batch, sequence_length=length, seed=seed) for batch, length in sizes]
    special: tuple[Kind, ...] = ("tiny", "large", "constant")
    return cases + [
        Case(batch_size=1, sequence_length=length, seed=seed, kind=kind)
        for kind in special
        for length in _SPECIAL_LENGTHS
        if length <= max_length
    ]


def _masks() -> Iterator[Mask]:
    yield from (mask for mask in get_args(Mask) if mask != "none")


def _masked(spec: GraphSpec, seed: int) -> list[Case]:
    lengths = [length for length in _MASKED_LENGTHS if length <= spec.axes["sequence_length"].max]
    cases = [
        Case(batch_size=2, sequence_length=length, seed=seed, mask=mask) for mask in _masks() for length in lengths
    ]
    return [*cases, replace(cases[-1], batch_size=1), replace(cases[-1], mask="left", kind="constant")]


def _cached(config: AnyConfig, spec: GraphSpec, seed: int) -> list[Case]:
    max_total = spec.axes["total_sequence_length"].max
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
        for mask in _masks()
        if past + length <= max_total
    ]
    return cases + [
        Case(batch_size=batch, sequence_length=sum(chunks), chunks=chunks, seed=seed)
        for chunks in _CHUNKS
        for batch in (1, 2)
        if sum(chunks) <= max_total and config.causal  # without causality earlier steps miss later tokens
    ]


def golden_cases(spec: GraphSpec, seed: int) -> list[Case]:
    """The few cases whose inputs and exact outputs travel with the bundle."""
    length = min(7, spec.axes["sequence_length"].max)
    cases = [Case(batch_size=1, sequence_length=1, seed=seed), Case(batch_size=2, sequence_length=length, seed=seed)]
    if spec.variant != "plain":
        cases.append(replace(cases[1], mask="left"))
    if spec.variant == "cached":
        cases.append(Case(batch_size=2, sequence_length=1, past_length=min(5, length - 1), seed=seed, mask="left"))
    return cases
