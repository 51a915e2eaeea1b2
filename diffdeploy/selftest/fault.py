"""Definition of a fault, and of the copy of a bundle into which it is introduced."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffdeploy.arrays import Array
from diffdeploy.bundle import Manifest
from diffdeploy.config import AnyConfig, DecoderConfig
from diffdeploy.formats import Format, require_format
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from diffdeploy.selftest.stand_in import StandIn

__all__ = ["Fault", "FaultTarget", "Place", "When", "Wrap", "all_of"]

Place = Literal["constants", "block", "model", "graph", "bundle", "runtime"]

# Wrapper between a runtime and its caller.
Wrap = Callable[[Callable[[dict[str, Array]], dict[str, Array]]], Callable[[dict[str, Array]], dict[str, Array]]]


@dataclass(frozen=True)
class FaultTarget:
    """The bundle that a fault is for, or the copy of it into which the fault is introduced.

    Attributes:
        path: directory of the bundle.
        manifest: manifest of the bundle.
        constants: those of the canonical weights, ``lambda``, ``rope.cos``, ``rope.sin``, ``norm_eps``,
            ``output_scale`` and ``softmax_scale`` that the artifact contains; see
            `diffdeploy.selftest.constant_fault`.
        weights: canonical weights.
    """

    path: Path
    manifest: Manifest
    constants: Mapping[str, Array]
    weights: Mapping[str, Array]

    @property
    def config(self) -> AnyConfig:
        """Config of the block, or that of a model's first layer, which has the same caches and masks as the others."""
        return self.manifest.config.attention

    @property
    def decoder(self) -> DecoderConfig | None:
        """Config of a whole model; ``None`` for a block."""
        config = self.manifest.config
        return config if isinstance(config, DecoderConfig) else None

    @property
    def format(self) -> Format:
        """Format of the bundle."""
        return require_format(self.manifest.format)

    @property
    def spec(self) -> GraphSpec:
        """Interface of the graph."""
        return self.manifest.graph


# Function that returns true if a change would be a fault in that bundle.
When = Callable[[FaultTarget], bool]


def _always(_: FaultTarget) -> bool:
    return True


def all_of(*conditions: When) -> When:
    """Combine conditions, of which later ones are evaluated only if earlier ones hold."""
    # A condition may read a property that an earlier one guarantees, such as the rotary base.
    return lambda target: all(condition(target) for condition in conditions)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way in which an artifact can be wrong.

    Attributes:
        name: words joined by underscores.
        place: place into which the fault is introduced.
        breaks: description of the fault, one clause.
        stage: the stage that is wrong, or the layer of a model; ``None`` if the fault belongs to no single one.
        inject: function that introduces the fault into a copy of a bundle.
        change: function that returns the changed constants by their names in a block, for a fault in constants.
        applies: function that returns true if a bundle can have the fault.
        wrap: wrapper around the calls of a loaded runtime, for faults outside the files.
        stand_in: substitute for a loaded runtime of a model, for faults outside the files.
        new_digests: true if the manifest is written again afterwards, so that digests do not reveal the fault.
        family: kind of the damage, or of the inputs that reveal the fault; its place by default.
        of_models: true if a whole model can have the fault as well as a block.
        provable: true if a sweep should detect it; a fault that a single exact value triggers is found only by chance.
    """

    name: str
    place: Place
    breaks: str
    stage: str | None = None
    inject: Callable[[FaultTarget], None] = field(default=lambda _: None)
    change: Callable[[FaultTarget], Mapping[str, Array]] | None = None
    applies: When = _always
    wrap: Wrap | None = None
    stand_in: "type[StandIn] | None" = None
    # The old digests would reveal every fault, and nothing else would be tested.
    new_digests: bool = True
    family: str = ""
    of_models: bool = False
    provable: bool = True

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.place)

    @property
    def is_put_into_files(self) -> bool:
        """True if the fault is in the bundle, and not in the runtime."""
        return self.wrap is None and self.stand_in is None
