"""The plan of a benchmark: one block, its candidates, and the sizes at which they are measured."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from diffdeploy.bundle import open_bundle
from diffdeploy.config import AnyConfig
from diffdeploy.graphs import DType, Variant
from diffdeploy.records import Record

__all__ = ["SOFTMAX", "SOFTMAX_BLOCKS", "SOFTMAX_COMPILED", "Candidate", "Plan", "Size"]

# Names of the plain softmax-attention block among the implementations.
SOFTMAX = "softmax"
SOFTMAX_COMPILED = "softmax-compiled"
SOFTMAX_BLOCKS = (SOFTMAX, SOFTMAX_COMPILED)
# The minimum that `graph_spec` accepts for every variant: below it, an axis would not be dynamic.
_LEAST_BATCH, _LEAST_LENGTH = 2, 4


class Size(Record):
    """One size of input.

    Attributes:
        batch_size: number of rows.
        sequence_length: number of tokens per row in this call.
        past_sequence_length: number of tokens per row in the cache.
    """

    batch_size: int
    sequence_length: int
    past_sequence_length: int = 0

    @classmethod
    def of_length(cls, length: int, *, batch_size: int, graph: Variant) -> Self:
        """A sequence of that length or, with a cache, one token after a past of that length."""
        if graph == "cached":
            return cls(batch_size=batch_size, sequence_length=1, past_sequence_length=length)
        return cls(batch_size=batch_size, sequence_length=length)

    @property
    def total_sequence_length(self) -> int:
        """Number of keys that the last token may see."""
        return self.past_sequence_length + self.sequence_length

    @property
    def id(self) -> str:
        """Name, such as ``B1-S2048`` or ``B1-P8192-S1``."""
        past = f"-P{self.past_sequence_length}" if self.past_sequence_length else ""
        return f"B{self.batch_size}{past}-S{self.sequence_length}"


class Candidate(Record):
    """One way to run the block: an eager implementation, the plain softmax block, or a bundle.

    Attributes:
        name: name in tables, and for choosing the baseline.
        impl: implementation of the eager block, ``softmax`` or ``softmax-compiled``; ``None`` for a bundle.
        format: format of a bundle.
        bundle: directory of a bundle.
        bundle_impl: implementation in a bundle's graph.
    """

    name: str
    impl: str | None = None
    format: str | None = None
    bundle: Path | None = None
    bundle_impl: str | None = None

    @classmethod
    def of_impl(cls, impl: str) -> "Candidate":
        """The eager block with an implementation, or the plain softmax block."""
        return cls(name=impl, impl=impl)

    @property
    def is_softmax(self) -> bool:
        """Whether this is the plain softmax block, eager or compiled."""
        return self.impl in SOFTMAX_BLOCKS

    @classmethod
    def of_bundle(cls, name: str, path: Path) -> "Candidate":
        """A bundle, as its manifest describes it."""
        manifest = open_bundle(path).manifest
        return cls(
            name=name, format=manifest.format, bundle=path.absolute(), bundle_impl=manifest.options.attention_impl
        )


class Plan(Record):
    """Everything that the measuring processes need.

    Attributes:
        config: config of the block that all candidates but the softmax blocks compute.
        weights: file with its canonical weights, in ``dtype``.
        graph: ``plain``, ``masked`` (the last row of the batch is padded on its left half) or ``cached``.
        dtype: dtype of weights and inputs.
        device: ``cpu`` or ``cuda``.
        threads: number of CPU threads of every candidate.
        sizes: sizes in the order in which they are measured.
        candidates: candidates with different names.
        baseline: name of the candidate that ratios refer to.
        rounds: number of rounds per size; by default as many as `timing.num_rounds` allows.
        seed: random seed for inputs and order.
    """

    # The second version has a subset of the fields of the first, so only the version distinguishes them.
    config: Annotated[AnyConfig, Field(discriminator="version")]
    weights: Path
    graph: Variant
    dtype: DType
    device: str
    threads: int
    sizes: tuple[Size, ...]
    candidates: tuple[Candidate, ...]
    baseline: str
    rounds: int | None = None
    seed: int = 0

    @property
    def max_positions(self) -> int:
        """Number of positions that have to be embedded."""
        return max(size.total_sequence_length for size in self.sizes)

    @property
    def max_batch_size(self) -> int:
        """Largest batch of a graph for all sizes."""
        return max(_LEAST_BATCH, *(size.batch_size for size in self.sizes))

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence of a graph for all sizes, past included."""
        return max(_LEAST_LENGTH, self.max_positions)
