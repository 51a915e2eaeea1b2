"""Types that describe an artifact: its facts and checks, its backend, its visible values and its faults."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest, Packed
from diffdeploy.formats.options import RunOptions
from diffdeploy.graphs import GraphSpec, Stage
from diffdeploy.records import Record

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ArtifactFacts",
    "Backend",
    "CacheBuffers",
    "Check",
    "FileFault",
    "GraphNode",
    "Intermediates",
    "LayerValues",
    "NodeKind",
    "Product",
    "ProductValues",
    "TritonBackend",
]

# Function from inputs of a model by name to its outputs and the output of each layer N, ``layers.N.output [B, S, D]``.
# It raises ExportError if the artifact does not run.
LayerValues = Callable[[Mapping[str, Array]], dict[str, Array]]


class Product(NamedTuple):
    """One product with a quantised matrix, observed in an artifact.

    Attributes:
        name: name of the matrix; equal matrices may share the name of one of them.
        x: input ``[..., K]``.
        packed: the matrix ``[N, K]``.
        y: result ``[..., N]``.
    """

    name: str
    x: Array
    packed: Packed
    y: Array


# Maps inputs of a model by name to all of its products with quantised matrices. Raises ExportError if the artifact does
# not run.
ProductValues = Callable[[Mapping[str, Array]], Iterator[Product]]


class Check(Record):
    """Result of one check, of the artifact's structure or of the consistency of its outputs."""

    name: str
    passed: bool
    detail: str


class ArtifactFacts(Record):
    """Description of an artifact, read from the artifact itself."""

    variant: str
    attention_ops: int
    opset: int | None
    inputs: list[str]
    outputs: list[str]

    @property
    def num_layers(self) -> int:
        """Number of layers of a model, counted by their caches; 0 for a block."""
        return sum(re.fullmatch(r"past_key_values\.\d+\.key", name) is not None for name in self.inputs)


class Backend(ABC):
    """An opened artifact, which takes the graph's inputs in order. `diffdeploy.runtime` checks the inputs first.

    Args:
        bundle: an opened bundle.
        options: options for running it.
        device: device that it runs on, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(self, bundle: Bundle, options: RunOptions, device: str) -> None:
        self.bundle, self.device = bundle, device
        self.spec: GraphSpec = bundle.manifest.graph
        self.open(options)

    @property
    @abstractmethod
    def description(self) -> str:
        """Backend, version and settings, for reports."""

    @abstractmethod
    def open(self, options: RunOptions) -> None:
        """Load the artifact.

        Raises:
            ExportError: the artifact cannot be loaded.
        """

    @abstractmethod
    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Compute the outputs, in order.

        Args:
            inputs: torch tensors or numpy arrays, in the order of the graph.
            as_torch: true to return torch tensors, false to return numpy arrays.
        """

    def buffers(self, batch_size: int, capacity: int, fill: float) -> "CacheBuffers | None":
        """Create a cache that is updated in place, for a batch; ``None`` if the artifact returns new caches.

        Args:
            batch_size: number of rows.
            capacity: number of tokens in a row for which there must be space.
            fill: initial value of the buffers.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release the resources that `open` acquired."""


class CacheBuffers(ABC):
    """Cache buffers ``[B, h_kv, capacity, w]`` for one batch of sequences.

    If the graph counts tokens, the tokens of a row are contiguous in the buffers, with padding on the right; otherwise
    each token has the same position as in the mask.

    Attributes:
        capacity: number of tokens in a row for which there is space.
    """

    capacity: int

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Array:
        """Compute the main output for new tokens, whose keys and values are appended to those of earlier calls.

        Args:
            inputs: inputs by name, without the caches; the mask is ``[B, T]``.
        """

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Current content of the buffers, by the names of the cache inputs."""


@dataclass(frozen=True)
class Intermediates:
    """The intermediate values of an artifact that can be observed while it runs.

    Attributes:
        values: function from inputs by name to the node name and value of every floating-point result, in the order of
            the graph. Raises ExportError if the artifact does not run.
        by_stream: true if the artifact computes the queries and keys of each stream separately.
        hidden: stages inside fused operators, whose results are not among the values.
    """

    values: "Callable[[Mapping[str, Array]], Iterator[tuple[str, Tensor]]]"
    by_stream: bool = False
    hidden: Collection[Stage] = ()


NodeKind = Literal["attention", "projection", "layout", "sizes", "other"]


@dataclass(frozen=True)
class GraphNode:
    """A node of an artifact's graph, with the properties that drawings show.

    Attributes:
        operator: name of the operator, without its domain.
        kind: ``projection`` for a product with weights, ``layout`` for an operator that only moves numbers, ``sizes``
            for an operator that computes only sizes.
        takes: names of its input values, except constants.
        gives: names of its output values.
        constants: names of the weights and tables among its inputs, if they are named.
    """

    operator: str
    kind: NodeKind
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FileFault:
    """A fault that only the files of one format can have, for the self-test.

    Attributes:
        name: words joined by underscores, beginning with the format.
        place: ``graph`` for the computation or the declarations of the artifact, ``bundle`` for mismatched files.
        breaks: description of the fault, one clause.
        edit: function that introduces the fault into the directory of a bundle.
        applies: function that returns true if a bundle with the given manifest can have the fault.
    """

    name: str
    place: Literal["graph", "bundle"] = "graph"
    breaks: str
    edit: Callable[[Path], None]
    applies: Callable[[Manifest], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True)
class TritonBackend:
    """Settings with which Triton Inference Server runs the artifacts of a format.

    Attributes:
        platform: ``platform`` in its model configuration.
        backend: ``backend`` in its model configuration.
        files: patterns of the files of a bundle that the backend reads, as for `fnmatch`.
        batches: true if it joins requests along the first axis.
        by_position: true if it names tensors ``INPUT__0`` and so on, in the order of the graph.
    """

    platform: str
    backend: str
    files: tuple[str, ...]
    batches: bool = True
    by_position: bool = False
