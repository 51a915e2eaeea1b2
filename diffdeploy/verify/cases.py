"""The inputs that an artifact is tried on: chosen from the declared ranges, seeded, with readable names."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import GraphSpec

__all__ = ["AnyCase", "Case", "Kind", "Mask", "UserCase"]

# New ones stand at the end: the numbers of a case depend on the places of its kind and mask, and golden vectors stay.
Kind = Literal["normal", "tiny", "large", "constant", "outliers", "offset", "scales", "zeros", "repeated"]
Mask = Literal["none", "left", "right", "ragged", "hidden", "mixed"]

_SCALES = {"tiny": 1e-3, "large": 8.0}
# Channels as large as in language models, and tokens of very different size, by powers of ten: as far as scores stay
# below the largest number of float16, where they are products of two of them.
_OUTLIERS = {"float16": (1.3, 1.9)}
_WIDEST_OUTLIERS = (2.0, 3.3)
_TOKENS = {"float16": (-4.0, 1.5)}
_WIDEST_TOKENS = (-6.0, 4.0)
_NUM_OUTLIERS, _OFFSET, _RUN, _EACH = 2, 10.0, 4, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. The ``kind`` and the ``mask`` say what it is hard for.

    Attributes:
        batch_size: rows.
        sequence_length: positions.
        seed: of the generator, together with all the sizes and kinds.
        kind: ``normal`` N(0, 1); ``tiny`` N(0, 1e-6), where the norm's epsilon rules; ``large`` N(0, 64), where the
            softmax saturates; ``constant`` the same vector at every position, where only the mask and the rotary
            embedding tell positions apart; ``outliers`` two channels 100 to 2,000 times as large; ``offset`` around
            10; ``scales`` tokens from 1e-6 to 1e4; ``zeros`` every third token 0; ``repeated`` tokens that come four
            times. In float16 outliers and scales stay where scores do not overflow.
        mask: padding of the last row: ``none``, at the ``left``, at the ``right``, ``ragged`` in between; ``hidden`` is
            a row of nothing else; ``mixed`` gives every row padding of its own: where, and how much, is drawn.
        drawn_positions: positions are drawn, in place of counting the tokens.
        past_length: tokens in the cache.
        chunks: lengths of the calls that the sequence is fed in, each with the cache of the one before; together they
            must give what one pass gives. Empty for a single call.
        row_by_row: whether each row is fed alone; together they must give what the batch gives.
        number: of a random case; 0 for the others.
    """

    batch_size: int
    sequence_length: int
    seed: int
    kind: Kind = "normal"
    mask: Mask = "none"
    past_length: int = 0
    chunks: tuple[int, ...] = ()
    row_by_row: bool = False
    number: int = 0
    drawn_positions: bool = False

    @property
    def id(self) -> str:
        """Name in reports, such as ``B2-S65-normal`` or ``B2-P63-S2-left-normal``."""
        parts = [f"random{self.number}"] if self.number else []
        parts += [f"B{self.batch_size}"]
        parts += [f"P{self.past_length}"] if self.past_length else []
        parts += [f"S{self.sequence_length}"]
        parts += [f"in-{'+'.join(map(str, self.chunks))}"] if self.chunks else []
        parts += ["row-by-row"] if self.row_by_row else []
        parts += [] if self.mask == "none" else [self.mask]
        parts += ["drawn"] if self.drawn_positions else []
        return "-".join((*parts, self.kind))

    @property
    def group(self) -> str:
        """What it tries, in words that other cases share."""
        if self.number:
            return "random"
        if self.chunks:
            return "cache equivalence"
        if self.row_by_row:
            return "batch invariance"
        words = ["past"] if self.past_length else []
        words += [] if self.mask == "none" else ["hidden rows" if self.mask == "hidden" else f"{self.mask} padding"]
        return ", ".join(words + ([self.kind] if self.kind != "normal" or not words else []))

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:
        """The inputs of a single call, by name, as ``spec`` wants them."""
        kinds, masks = get_args(Kind), get_args(Mask)
        numbers = (self.batch_size, self.sequence_length, self.past_length)
        # Only where there is one: a 0 would give the other cases, and stored golden vectors, other inputs.
        more = (self.number,) if self.number else ()
        # All that names a case, so that no two share their inputs, and the name alone gives them again.
        generator = np.random.default_rng([self.seed, *numbers, kinds.index(self.kind), masks.index(self.mask), *more])
        hidden = spec.inputs["hidden_states"]
        # Drawn in float32 and then rounded, so that every dtype is tried on the same numbers.
        values = self._values(generator, int(hidden.shape[-1]), hidden.dtype)
        inputs = {"hidden_states": values.astype(hidden.dtype)}
        if "attention_mask" in spec.inputs:
            tokens = self._tokens(generator)
            inputs["attention_mask"] = tokens
            if "position_ids" in spec.inputs:
                # As generation counts them: padding takes no position.
                positions = np.maximum(tokens.cumsum(axis=1) - 1, 0)
                inputs["position_ids"] = np.ascontiguousarray(positions[:, self.past_length :])
                if self.drawn_positions:
                    bounds = spec.inputs["position_ids"].values
                    assert bounds is not None
                    size = (self.batch_size, self.sequence_length)
                    inputs["position_ids"] = generator.integers(bounds.min, bounds.max + 1, size)
        for name in ("past_key_values.key", "past_key_values.value"):
            if name in spec.inputs:
                _, heads, _, width = spec.inputs[name].shape
                shape = (self.batch_size, int(heads), self.past_length, int(width))
                inputs[name] = generator.standard_normal(shape, dtype=np.float32).astype(spec.inputs[name].dtype)
        return inputs

    def _values(self, generator: np.random.Generator, width: int, dtype: str) -> Array:
        """Hidden states ``[B, S, D]``, float32."""
        length = self.sequence_length
        rows = 1 if self.kind == "constant" else -(-length // _RUN) if self.kind == "repeated" else length
        values = generator.standard_normal((self.batch_size, rows, width), dtype=np.float32)
        values *= np.float32(_SCALES.get(self.kind, 1.0))
        if self.kind == "constant":
            return np.repeat(values, length, axis=1)
        if self.kind == "repeated":
            return np.repeat(values, _RUN, axis=1)[:, :length]
        if self.kind == "outliers":
            channels = generator.choice(width, min(_NUM_OUTLIERS, width), replace=False)
            powers = generator.uniform(*_OUTLIERS.get(dtype, _WIDEST_OUTLIERS), len(channels))
            values[..., channels] *= np.float32(10.0) ** powers.astype(np.float32)
        elif self.kind == "offset":
            values += np.float32(_OFFSET)
        elif self.kind == "scales":
            powers = generator.uniform(*_TOKENS.get(dtype, _WIDEST_TOKENS), (self.batch_size, length, 1))
            values *= np.float32(10.0) ** powers.astype(np.float32)
        elif self.kind == "zeros":
            values[:, ::_EACH] = 0
        return values

    def _tokens(self, generator: np.random.Generator) -> Array:
        total = self.past_length + self.sequence_length
        tokens = np.ones((self.batch_size, total), dtype=np.int64)
        if self.mask == "mixed":
            for row in tokens:
                # One, few, most or all tokens; at either end or anywhere.
                hidden = int(min(total, np.ceil(total ** generator.uniform(0.0, 1.2))))
                places = generator.permutation(total) if generator.integers(3) == 0 else np.arange(total)
                row[places[:hidden] if generator.integers(2) else places[total - hidden :]] = 0
            return tokens
        # In the last row alone: the others show a mask that is applied to the wrong row.
        half = max(1, total // 2)
        if self.mask == "left":
            tokens[-1, :half] = 0
        elif self.mask == "right":
            tokens[-1, total - half :] = 0
        elif self.mask == "ragged":
            # The first token too, so that under causality the first query sees nothing.
            tokens[-1, ::3] = 0
        elif self.mask == "hidden":
            tokens[-1] = 0
        return tokens


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

    @property
    def id(self) -> str:
        """Name in reports."""
        return f"user-{self.name}"

    @property
    def group(self) -> str:
        """What it tries."""
        return "user"

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:  # noqa: ARG002 - they were checked when they were read
        """The inputs of a single call, by name."""
        return self.arrays


AnyCase = Case | UserCase
