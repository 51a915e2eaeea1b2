"""What a fault is, and the copy of a bundle that it is put into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffdeploy.arrays import Array
from diffdeploy.bundle import Manifest
from diffdeploy.config import AnyConfig
from diffdeploy.formats import Format, require_format
from diffdeploy.graphs import GraphSpec, Stage

__all__ = ["Fault", "FaultTarget", "Place", "When", "Wrap", "all_of"]

Place = Literal["constants", "block", "graph", "bundle", "runtime"]

# Stands between a runtime and what asks it.
Wrap = Callable[[Callable[[dict[str, Array]], dict[str, Array]]], Callable[[dict[str, Array]], dict[str, Array]]]


@dataclass(frozen=True)
class FaultTarget:
    """The bundle that a fault is for, or a copy of it that the fault is put into.

    Attributes:
        path: its directory.
        manifest: of the bundle.
        constants: what the artifact holds of the canonical weights, ``lambda``, ``rope.cos``, ``rope.sin``,
            ``norm_eps``, ``output_scale`` and ``softmax_scale``; see `diffdeploy.selftest.constant_fault`.
        weights: canonical weights.
    """

    path: Path
    manifest: Manifest
    constants: Mapping[str, Array]
    weights: Mapping[str, Array]

    @property
    def config(self) -> AnyConfig:
        """Of the block."""
        return self.manifest.block

    @property
    def format(self) -> Format:
        """The format that the bundle is of."""
        return require_format(self.manifest.format)

    @property
    def spec(self) -> GraphSpec:
        """Of the graph."""
        return self.manifest.graph


# Whether something would be a fault of that bundle at all.
When = Callable[[FaultTarget], bool]


def _always(_: FaultTarget) -> bool:
    return True


def all_of(*conditions: When) -> When:
    """All conditions hold; later ones are asked only where earlier ones do."""
    # A condition may read what only targets of an earlier one have, such as the rotary base.
    return lambda target: all(condition(target) for condition in conditions)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way for an artifact to be wrong.

    Attributes:
        name: in words joined by underscores.
        place: where it is put in.
        breaks: what is wrong then, one clause.
        stage: the stage that is wrong; ``None`` for a fault of the whole.
        inject: puts it into a copy of a bundle.
        applies: whether it would be a fault of this bundle at all.
        wrap: what it does to a loaded runtime instead.
        new_digests: whether the manifest is written again afterwards, so that the digests do not give it away.
        family: what kind of inputs or of damage shows it; by default its place.
        provable: whether a sweep can be expected to see it; one that a single exact value triggers is seen by chance.
    """

    name: str
    place: Place
    breaks: str
    stage: Stage | None = None
    inject: Callable[[FaultTarget], None] = field(default=lambda _: None)
    applies: When = _always
    wrap: Wrap | None = None
    # The old digests would catch every fault, and nothing else would be tried.
    new_digests: bool = True
    family: str = ""
    provable: bool = True

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.place)
