"""What is said of an artifact, what runs it, and what of it can be seen or spoiled."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
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
    "Intermediates",
    "LayerValues",
    "TritonBackend",
]

# From inputs of a model by name to its outputs, and to what each layer N gives, ``layers.N.output [B, S, D]``.
# It raises ExportError where the artifact does not run.
LayerValues = Callable[[Mapping[str, Array]], dict[str, Array]]


class Check(Record):
    """One check that is passed or not: of the artifact's structure, or of how its outputs hang together."""

    name: str
    passed: bool
    detail: str


class ArtifactFacts(Record):
    """What the artifact itself says it is."""

    variant: str
    attention_ops: int
    opset: int | None
    inputs: list[str]
    outputs: list[str]

    @property
    def num_layers(self) -> int:
        """Layers of a model, each of which has a cache of its own; 0 of a block."""
        return sum(re.fullmatch(r"past_key_values\.\d+\.key", name) is not None for name in self.inputs)


class Backend(ABC):
    """An opened artifact, which takes the graph's inputs in their order. `diffdeploy.runtime` checks them before.

    Args:
        bundle: an opened bundle.
        options: what it is run with.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
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
            ExportError: it cannot be loaded.
        """

    @abstractmethod
    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Outputs in their order for inputs in theirs.

        Args:
            inputs: torch tensors or numpy arrays.
            as_torch: whether outputs are wanted as torch tensors, or as numpy arrays.
        """

    def buffers(self, batch_size: int, capacity: int, fill: float) -> "CacheBuffers | None":
        """A cache that is written in place, for a batch of sequences; ``None`` where the artifact makes new ones.

        Args:
            batch_size: rows.
            capacity: tokens of a row that there must be room for.
            fill: what the buffers hold before.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Release what `open` took."""


class CacheBuffers(ABC):
    """Buffers ``[B, h_kv, capacity, w]`` that one batch of sequences is computed with.

    Where the graph counts tokens, those of a row lie side by side in them, and it is padded on the right; elsewhere a
    token lies where the mask has it.

    Attributes:
        capacity: tokens of a row that there is room for.
    """

    capacity: int

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> Array:
        """What is computed from new tokens, whose keys and values are written behind those of earlier calls.

        Args:
            inputs: by the names of the graph, all but the caches; the mask is ``[B, T]``.
        """

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """The buffers as they are, by the names of the inputs that take them."""


@dataclass(frozen=True)
class Intermediates:
    """The values inside an artifact that can be seen while it runs.

    Attributes:
        values: name of the node and value of every floating-point result for inputs by name, in the order of the graph.
            It raises ExportError where the artifact does not run.
        by_stream: whether the artifact computes the queries and keys of each stream by themselves.
        hidden: stages that are inside its operators, and not among its values.
    """

    values: "Callable[[Mapping[str, Array]], Iterator[tuple[str, Tensor]]]"
    by_stream: bool = False
    hidden: Collection[Stage] = ()


@dataclass(frozen=True, kw_only=True)
class FileFault:
    """A fault that only the files of one format can have, for the self-test.

    Attributes:
        name: words joined by underscores, the format's first.
        place: ``graph`` for what the artifact computes or declares, ``bundle`` for files that do not belong together.
        breaks: what is wrong then, one clause.
        edit: puts the fault into the directory of a bundle.
        applies: whether it would be a fault of a bundle with that manifest.
    """

    name: str
    place: Literal["graph", "bundle"] = "graph"
    breaks: str
    edit: Callable[[Path], None]
    applies: Callable[[Manifest], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True)
class TritonBackend:
    """How Triton Inference Server runs the artifacts of a format.

    Attributes:
        platform: in its model configuration.
        backend: in its model configuration.
        files: of a bundle, that the backend reads, as far as they are there.
        batches: whether it puts requests together along the first axis.
        by_position: whether it calls tensors ``INPUT__0`` and so on, in the order of the graph.
    """

    platform: str
    backend: str
    files: tuple[str, ...]
    batches: bool = True
    by_position: bool = False
