"""What a benchmark measures: one block, its candidates and the sizes that they are tried at."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from diffdeploy.bundle import open_bundle
from diffdeploy.config import AnyConfig
from diffdeploy.graphs import DType, Variant
from diffdeploy.records import Record

__all__ = ["SOFTMAX", "Candidate", "Plan", "Size"]

# The plain softmax-attention block, by the name that stands among the implementations.
SOFTMAX = "softmax"
# The least that `graph_spec` accepts, whatever the variant: below it an axis would not be dynamic.
_LEAST_BATCH, _LEAST_LENGTH = 2, 4


class Size(Record):
    """One size of input.

    Attributes:
        batch_size: rows.
        sequence_length: tokens of each row in this call.
        past_sequence_length: tokens of each row in the cache.
    """

    batch_size: int
    sequence_length: int
    past_sequence_length: int = 0

    @classmethod
    def of_length(cls, length: int, *, batch_size: int, graph: Variant) -> Self:
        """A sequence of that length; with a cache, one token behind a past of it."""
        if graph == "cached":
            return cls(batch_size=batch_size, sequence_length=1, past_sequence_length=length)
        return cls(batch_size=batch_size, sequence_length=length)

    @property
    def total_sequence_length(self) -> int:
        """Keys that the last token may see."""
        return self.past_sequence_length + self.sequence_length

    @property
    def id(self) -> str:
        """Such as ``B1-S2048`` or ``B1-P8192-S1``."""
        past = f"-P{self.past_sequence_length}" if self.past_sequence_length else ""
        return f"B{self.batch_size}{past}-S{self.sequence_length}"


class Candidate(Record):
    """One way to run the block: an eager implementation, the plain softmax block, or a bundle.

    Attributes:
        name: in tables, and for choosing the baseline.
        impl: implementation of the eager block, or ``softmax``; ``None`` for a bundle.
        format: of a bundle.
        bundle: directory of a bundle.
        bundle_impl: implementation that a bundle's graph is written with.
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

    @classmethod
    def of_bundle(cls, name: str, path: Path) -> "Candidate":
        """A bundle, by what its manifest says."""
        manifest = open_bundle(path).manifest
        return cls(
            name=name, format=manifest.format, bundle=path.absolute(), bundle_impl=manifest.options.attention_impl
        )


class Plan(Record):
    """Everything that the measuring processes need to know.

    Attributes:
        config: of the block that all candidates but ``softmax`` compute.
        weights: file with its canonical weights, in ``dtype``.
        graph: ``plain``, ``masked`` (the last row of the batch is padded on its left half) or ``cached``.
        dtype: of weights and inputs.
        device: ``cpu`` or ``cuda``.
        threads: of every candidate, on a CPU.
        sizes: in the order in which they are measured.
        candidates: with different names.
        baseline: name of the candidate that ratios refer to.
        rounds: per size; by default as many as `timing.num_rounds` finds room for.
        seed: of inputs and order.
    """

    # The fields of the second version are a part of those of the first, so only the version tells which it is.
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
        """Positions that have to be embedded."""
        return max(size.total_sequence_length for size in self.sizes)

    @property
    def max_batch_size(self) -> int:
        """Largest batch of a graph that holds all sizes."""
        return max(_LEAST_BATCH, *(size.batch_size for size in self.sizes))

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence of a graph that holds all sizes, past included."""
        return max(_LEAST_LENGTH, self.max_positions)
