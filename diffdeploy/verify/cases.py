"""The inputs that an artifact is tried on: chosen from the declared ranges, seeded, with readable names."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.values import (
    EXTREME_KINDS,
    Kind,
    Mask,
    counted_positions,
    draw_ids,
    draw_past,
    draw_states,
    draw_tokens,
    without_holes,
)

__all__ = ["AnyCase", "Case", "Kind", "Mask", "Positions", "UserCase"]

Positions = Literal["counted", "drawn"]

# Of a long sequence all of these are compared, since they must be what they are without the rest of it.
_FIRST_QUERIES, _LAST_QUERIES = 32, 16
# Rows of a large batch that differ from each other.
_DISTINCT_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. The ``kind`` and the ``mask`` say what it is hard for.

    Attributes:
        batch_size: rows.
        sequence_length: positions.
        seed: of the generator, together with all the sizes and kinds.
        kind: ``normal`` N(0, 1); ``tiny`` N(0, 1e-6), where the norm's epsilon rules; ``large`` N(0, 64), where the
            softmax saturates; ``constant`` the same vector at every position, where only the mask and the rotary
            embedding tell positions apart; ``zeros`` with tokens of zeros; ``repeated`` a few tokens again and again;
            ``offset`` far from a mean of 0; ``outliers`` channels 100 to 2000 times as large as the others; ``heavy``
            Student's t with two degrees of freedom; ``scaled`` a scale of 1e-6 to 1e4 for each row; ``scales`` one for
            each token; ``nan`` and ``infinity`` in one token of the first row.
        mask: ``none``; padding of the last row at the ``left``, at the ``right``, ``ragged`` in between, or ``hidden``,
            a row of nothing else; ``mixed``, where every row hides other tokens, from one to all.
        positions: ``counted`` from the mask, as generation does, or ``drawn`` from the declared range.
        past_length: tokens in the cache.
        chunks: lengths of the calls that the sequence is fed in, each with the cache of the one before; together they
            must give what one pass gives. Empty for a single call.
        row_by_row: whether each row is fed alone; together they must give what the batch gives.
        decoded: so many of the last tokens are decoded one by one, as generation does; the prompt before is padded on
            the left or not at all.
        repeats: whether rows behind the eighth are among the first eight again, in random order: they must give what
            those give, and the formula is computed for those alone.
        num_queries: positions whose output is compared, spread over the sequence; 0 for all.
        number: of a random case; 0 for the others.
    """

    batch_size: int
    sequence_length: int
    seed: int
    kind: Kind = "normal"
    mask: Mask = "none"
    positions: Positions = "counted"
    past_length: int = 0
    chunks: tuple[int, ...] = ()
    row_by_row: bool = False
    decoded: int = 0
    repeats: bool = False
    num_queries: int = 0
    number: int = 0

    @property
    def id(self) -> str:
        """Name in reports, such as ``B2-S65-normal`` or ``B2-P63-S2-left-normal``."""
        parts = [f"random{self.number}"] if self.number else []
        parts += [f"B{self.batch_size}"]
        parts += [f"P{self.past_length}"] if self.past_length else []
        parts += [f"S{self.sequence_length}"]
        parts += [f"in-{'+'.join(map(str, self.chunks))}"] if self.chunks else []
        parts += [f"decoded{self.decoded}"] if self.decoded else []
        parts += ["row-by-row"] if self.row_by_row else []
        parts += ["repeats"] if self.repeats else []
        parts += [] if self.mask == "none" else [self.mask]
        parts += ["positions"] if self.positions == "drawn" else []
        return "-".join((*parts, self.kind))

    @property
    def group(self) -> str:
        """What it tries, in words that other cases share."""
        if self.number:
            return "random"
        if self.chunks:
            return "cache equivalence"
        if self.decoded:
            return "generation"
        if self.row_by_row or self.repeats:
            return "batch invariance"
        words = ["long"] if self.num_queries else []
        words += ["past"] if self.past_length else []
        words += [] if self.mask == "none" else ["hidden rows" if self.mask == "hidden" else f"{self.mask} padding"]
        words += ["drawn positions"] if self.positions == "drawn" else []
        return ", ".join(words + ([self.kind] if self.kind != "normal" or not words else []))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, positions, and tokens in the cache."""
        return self.batch_size, self.sequence_length, self.past_length

    @property
    def one_call(self) -> bool:
        """Whether the artifact takes it as it is."""
        return not (self.chunks or self.row_by_row or self.decoded)

    @property
    def is_extreme(self) -> bool:
        """Whether a right computation in the dtype may overflow, or has NaN to begin with."""
        return self.kind in EXTREME_KINDS

    @property
    def by_row(self) -> bool:
        """Whether each row is judged by itself: of rows in different sizes the largest would hide all others."""
        return self.repeats or self.kind == "scaled"

    def queries(self) -> Array | None:
        """Positions whose output is compared, ascending; ``None`` for all."""
        if not 0 < self.num_queries < self.sequence_length:
            return None
        length = self.sequence_length
        ends = [*range(min(_FIRST_QUERIES, length)), *range(max(0, length - _LAST_QUERIES), length)]
        # One of each of equal parts, so that no part as long as a kernel's block is left out.
        parts = np.linspace(0, length, self.num_queries + 1)
        drawn = np.floor(np.random.default_rng([self.seed, length]).uniform(parts[:-1], parts[1:])).astype(np.int64)
        return np.unique(np.concatenate((np.array(ends, dtype=np.int64), drawn)))

    def sources(self) -> Array:
        """For each row, the row among the distinct ones that it is."""
        distinct = min(self.batch_size, _DISTINCT_ROWS) if self.repeats else self.batch_size
        again = np.random.default_rng([self.seed, self.batch_size]).integers(0, distinct, self.batch_size - distinct)
        return np.concatenate((np.arange(distinct), again))

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:
        """The inputs of a single call, by name, as ``spec`` wants them."""
        kinds, masks = get_args(Kind), get_args(Mask)
        sources = self.sources()
        num_rows, total = int(sources.max()) + 1, self.past_length + self.sequence_length
        numbers = (self.batch_size, self.sequence_length, self.past_length)
        # Only where there is one: a 0 would give the other cases, and stored golden vectors, other inputs.
        more = (self.number,) if self.number else ()
        # All that names a case, so that no two share their inputs, and the name alone gives them again.
        entropy = [self.seed, *numbers, kinds.index(self.kind), masks.index(self.mask), *more]
        generator, of_masks = np.random.default_rng(entropy), np.random.default_rng([*entropy, 1])
        inputs = {spec.main_input: self._main(spec, generator, num_rows)}
        if "attention_mask" in spec.inputs:
            tokens = draw_tokens(self.mask, of_masks, num_rows, total)
            if spec.padding == "contiguous":
                tokens = without_holes(tokens)
            inputs["attention_mask"] = tokens
            if "position_ids" in spec.inputs:
                inputs["position_ids"] = self._position_ids(spec, tokens, of_masks)
        for name in spec.caches:
            _, heads, _, width = spec.inputs[name].shape
            shape = (num_rows, int(heads), self.past_length, int(width))
            inputs[name] = draw_past(self.kind, generator, shape).astype(spec.inputs[name].dtype)
        return {name: array[sources] for name, array in inputs.items()} if self.repeats else inputs

    def _main(self, spec: GraphSpec, generator: np.random.Generator, num_rows: int) -> Array:
        """Hidden states, or tokens."""
        tensor = spec.inputs[spec.main_input]
        if tensor.dtype == "int64":
            assert tensor.values is not None
            return draw_ids(self.kind, generator, num_rows, self.sequence_length, tensor.values.max + 1)
        states = draw_states(self.kind, generator, num_rows, self.sequence_length, int(tensor.shape[-1]))
        return states.astype(tensor.dtype)

    def _position_ids(self, spec: GraphSpec, tokens_BT: Array, generator: np.random.Generator) -> Array:
        if self.positions == "drawn":
            values = spec.inputs["position_ids"].values
            assert values is not None
            return generator.integers(values.min, values.max + 1, (len(tokens_BT), self.sequence_length))
        return counted_positions(tokens_BT, self.past_length)


@dataclass(frozen=True, kw_only=True)
class UserCase:
    """An input that the user brought; fed whole.

    Attributes:
        name: in the user's file, or its sizes.
        arrays: by the names of the graph, as it wants them.
    """

    name: str
    arrays: dict[str, Array] = field(repr=False)
    chunks: tuple[int, ...] = ()
    row_by_row: bool = False
    decoded: int = 0
    one_call: bool = True
    # What users bring may overflow their dtype, and is nobody's fault.
    is_extreme: bool = True
    by_row: bool = False

    @property
    def id(self) -> str:
        """Name in reports."""
        return f"user-{self.name}"

    @property
    def group(self) -> str:
        """What it tries."""
        return "user"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, positions, and tokens in the cache."""
        batch_size, length = self._main.shape[:2]
        past = next((array for name, array in self.arrays.items() if name.startswith("past_key_values.")), None)
        return batch_size, length, 0 if past is None else past.shape[2]

    @property
    def _main(self) -> Array:
        return self.arrays["input_ids" if "input_ids" in self.arrays else "hidden_states"]

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:  # noqa: ARG002 - they were checked when they were read
        """The inputs of a single call, by name."""
        return self.arrays

    def queries(self) -> Array | None:
        """All are compared."""
        return None

    def sources(self) -> Array:
        """Every row is one of its own."""
        return np.arange(len(self._main))


AnyCase = Case | UserCase
