"""The inputs that an artifact is verified with: chosen from the declared ranges, seeded, and given readable names."""

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

# Numbers of positions at the start and the end of a long sequence that are always compared; the outputs at the start
# do not depend on the rest.
_FIRST_QUERIES, _LAST_QUERIES = 32, 16
# Maximum number of distinct rows in a large batch.
_DISTINCT_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input, whose ``kind`` and ``mask`` define what makes it difficult.

    Attributes:
        batch_size: number of rows.
        sequence_length: number of positions.
        seed: random seed; the generator is seeded with it and with all sizes and kinds.
        kind: ``normal`` N(0, 1); ``tiny`` N(0, 1e-6), where the norm's epsilon dominates; ``large`` N(0, 64), where the
            softmax saturates; ``constant``, the same vector at every position, where only the mask and the rotary
            embedding distinguish positions; ``zeros``, with tokens of zeros; ``repeated``, a few tokens again and
            again; ``offset``, with a mean far from 0; ``outliers``, with channels 100 to 2000 times as large as the
            others; ``heavy``, Student's t with two degrees of freedom; ``scaled``, a scale of 1e-6 to 1e4 for each row;
            ``scales``, one for each token; ``nan`` and ``infinity``, in one token of the first row.
        mask: ``none``; padding of the last row on the ``left``, on the ``right`` or ``ragged`` in between;
            ``hidden``, where the last row is all padding; ``mixed``, where every row hides different tokens, from one
            to all.
        positions: ``counted`` from the mask, as in generation, or ``drawn`` from the declared range.
        past_length: number of tokens in the cache.
        chunks: lengths of the calls in which the sequence is fed, each with the cache of the previous one; together
            they must give the same result as one pass. Empty for a single call.
        row_by_row: true if each row is fed separately; together the rows must give the same result as the batch.
        decoded: number of tokens at the end that are decoded one by one, as in generation; the prompt before them is
            padded on the left or not at all.
        repeats: true if rows after the eighth repeat the first eight in random order; they must give the same results
            as the rows that they repeat, and the formula is computed only for the first eight.
        num_queries: number of positions whose output is compared, spread over the sequence; 0 for all.
        number: index of a random case; 0 for the others.
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
        """Purpose of the case, in words shared with similar cases."""
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
        """Numbers of rows, positions, and tokens in the cache."""
        return self.batch_size, self.sequence_length, self.past_length

    @property
    def one_call(self) -> bool:
        """True if the artifact takes the case in one call."""
        return not (self.chunks or self.row_by_row or self.decoded)

    @property
    def is_extreme(self) -> bool:
        """True if a correct computation in the dtype may overflow, or starts with NaN."""
        return self.kind in EXTREME_KINDS

    @property
    def by_row(self) -> bool:
        """True if each row is judged separately: among rows of different scales, the largest would hide all others."""
        return self.repeats or self.kind == "scaled"

    def queries(self) -> Array | None:
        """Positions whose output is compared, ascending; ``None`` for all."""
        if not 0 < self.num_queries < self.sequence_length:
            return None
        length = self.sequence_length
        ends = [*range(min(_FIRST_QUERIES, length)), *range(max(0, length - _LAST_QUERIES), length)]
        # One position from each of many equal parts, so that no stretch as long as a kernel's block is left out.
        parts = np.linspace(0, length, self.num_queries + 1)
        drawn = np.floor(np.random.default_rng([self.seed, length]).uniform(parts[:-1], parts[1:])).astype(np.int64)
        return np.unique(np.concatenate((np.array(ends, dtype=np.int64), drawn)))

    def sources(self) -> Array:
        """For each row, the index of the distinct row with the same inputs."""
        distinct = min(self.batch_size, _DISTINCT_ROWS) if self.repeats else self.batch_size
        again = np.random.default_rng([self.seed, self.batch_size]).integers(0, distinct, self.batch_size - distinct)
        return np.concatenate((np.arange(distinct), again))

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:
        """Inputs of a single call, by name, as ``spec`` defines them."""
        kinds, masks = get_args(Kind), get_args(Mask)
        sources = self.sources()
        num_rows, total = int(sources.max()) + 1, self.past_length + self.sequence_length
        numbers = (self.batch_size, self.sequence_length, self.past_length)
        # Added only if given: a 0 would change the inputs of the other cases and of stored golden vectors.
        more = (self.number,) if self.number else ()
        # The entropy includes everything in the case's name, so that no two cases share inputs, and the name alone
        # reproduces them.
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
        """Hidden states or tokens."""
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
            drawn = generator.integers(values.min, values.max + 1, (len(tokens_BT), self.sequence_length))
            # Tables may be wrong at their ends alone, so the row with the most visible tokens reads both ends.
            new_tokens = tokens_BT[:, -self.sequence_length :]
            row = int(new_tokens.sum(axis=1).argmax())
            visible = np.flatnonzero(new_tokens[row])
            drawn[row, visible[:1]], drawn[row, visible[-1:]] = values.min, values.max
            return drawn
        return counted_positions(tokens_BT, self.past_length)


@dataclass(frozen=True, kw_only=True)
class UserCase:
    """An input from the user, which is fed in one call.

    Attributes:
        name: name in the user's file, or the sizes of the input.
        arrays: arrays by the names of the graph, with its dtypes and shapes.
    """

    name: str
    arrays: dict[str, Array] = field(repr=False)
    chunks: tuple[int, ...] = ()
    row_by_row: bool = False
    decoded: int = 0
    one_call: bool = True
    # Inputs of users may overflow their dtype, which is not the artifact's fault.
    is_extreme: bool = True
    by_row: bool = False

    @property
    def id(self) -> str:
        """Name in reports."""
        return f"user-{self.name}"

    @property
    def group(self) -> str:
        """Purpose of the case."""
        return "user"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of rows, positions, and tokens in the cache."""
        batch_size, length = self._main.shape[:2]
        past = next((array for name, array in self.arrays.items() if name.startswith("past_key_values.")), None)
        return batch_size, length, 0 if past is None else past.shape[2]

    @property
    def _main(self) -> Array:
        return self.arrays["input_ids" if "input_ids" in self.arrays else "hidden_states"]

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:  # noqa: ARG002 - inputs were checked when they were read
        """Inputs of a single call, by name."""
        return self.arrays

    def queries(self) -> Array | None:
        """``None``: all positions are compared."""
        return None

    def sources(self) -> Array:
        """Index of each row, since all rows are distinct."""
        return np.arange(len(self._main))


AnyCase = Case | UserCase
