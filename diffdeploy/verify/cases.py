"""The inputs that an artifact is tried on: chosen from the declared ranges, seeded, with readable names."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from diffdeploy.config import DiffAttentionConfig
from diffdeploy.graphs import GraphSpec

__all__ = ["Case", "Kind", "golden_cases", "plain_cases"]

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["normal", "tiny", "large", "constant"]

_LENGTHS = (1, 2, 3, 7, 13, 31, 63, 64, 65, 127, 128, 129)
_SPECIAL_LENGTHS = (1, 7, 65)
# Scores of all heads of one case: 128 MiB in fp32, and the eager block holds a few such tensors.
_MAX_SCORES = 2**25
_MAX_ELEMENTS = 2**25


@dataclass(frozen=True)
class Case:
    """One input. The ``kind`` says what it is hard for.

    Attributes:
        batch_size: rows.
        sequence_length: positions.
        kind: ``normal`` N(0, 1); ``tiny`` N(0, 1e-6), where the norm's epsilon rules; ``large`` N(0, 64), where the
            softmax saturates; ``constant`` the same vector at every position, where only the mask and the rotary
            embedding tell positions apart.
        seed: of the generator, together with all the above.
    """

    batch_size: int
    sequence_length: int
    kind: Kind
    seed: int

    @property
    def id(self) -> str:
        """Name in reports, such as ``B2-S65-normal``."""
        return f"B{self.batch_size}-S{self.sequence_length}-{self.kind}"

    def inputs(self, spec: GraphSpec) -> dict[str, Array]:
        """The inputs by name, as ``spec`` wants them."""
        kind_number = get_args(Kind).index(self.kind)
        generator = np.random.default_rng([self.seed, self.batch_size, self.sequence_length, kind_number])
        tensor = spec.inputs["hidden_states"]
        rows = 1 if self.kind == "constant" else self.sequence_length
        values = generator.standard_normal((self.batch_size, rows, tensor.shape[-1]), dtype=np.float32)  # type: ignore[arg-type]
        values *= {"normal": 1.0, "tiny": 1e-3, "large": 8.0, "constant": 1.0}[self.kind]
        values = np.repeat(values, self.sequence_length // rows, axis=1)
        return {"hidden_states": values.astype(tensor.dtype)}


def plain_cases(config: DiffAttentionConfig, spec: GraphSpec, seed: int) -> list[Case]:
    """The sweep of the ``plain`` variant: lengths around powers of two and primes, both ends of both ranges.

    The longest sequence and the largest batch are the largest declared ones that this sweep's memory allows.
    """
    max_batch, max_length = spec.axes["batch_size"].max, spec.axes["sequence_length"].max
    lengths = [length for length in _LENGTHS if length <= max_length]
    longest = min(max_length, int((_MAX_SCORES / (2 * config.num_heads)) ** 0.5), _MAX_ELEMENTS // config.embed_dim)
    short = min(3, max_length)
    widest = max(1, min(max_batch, _MAX_ELEMENTS // (short * config.embed_dim)))
    sizes = [(batch, length) for length in lengths for batch in (1, min(2, max_batch))]
    sizes += [(widest, short), (1, max(1, longest))]
    cases = [Case(batch, length, "normal", seed) for batch, length in sizes]
    special: tuple[Kind, ...] = ("tiny", "large", "constant")
    cases += [Case(1, length, kind, seed) for kind in special for length in _SPECIAL_LENGTHS if length <= max_length]
    return list(dict.fromkeys(cases))


def golden_cases(spec: GraphSpec, seed: int) -> list[Case]:
    """The few cases whose inputs and exact outputs travel with the bundle."""
    length = min(7, spec.axes["sequence_length"].max)
    return [Case(1, 1, "normal", seed), Case(min(2, spec.axes["batch_size"].max), length, "normal", seed)]
