"""What a fault is, and the copy of a bundle that it is put into."""

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
        """Of the block; of a model, that of the first layer, which stands for all in their caches and masks."""
        return self.manifest.config.attention

    @property
    def decoder(self) -> DecoderConfig | None:
        """Of a whole model; ``None`` for a block."""
        config = self.manifest.config
        return config if isinstance(config, DecoderConfig) else None

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
        stage: the stage that is wrong, or the layer of a model; ``None`` for a fault of the whole.
        inject: puts it into a copy of a bundle.
        change: of a fault in constants, those that are others, by their names in a block.
        applies: whether it would be a fault of this bundle at all.
        wrap: what it does to the calls of a loaded runtime instead.
        stand_in: what stands in place of a loaded runtime of a model instead.
        new_digests: whether the manifest is written again afterwards, so that the digests do not give it away.
        family: what kind of inputs or of damage shows it; by default its place.
        of_models: whether a whole model can have it as well as a block.
        provable: whether a sweep can be expected to see it; one that a single exact value triggers is seen by chance.
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
    # The old digests would catch every fault, and nothing else would be tried.
    new_digests: bool = True
    family: str = ""
    of_models: bool = False
    provable: bool = True

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.place)

    @property
    def is_put_into_files(self) -> bool:
        """Whether it is in the bundle, and not in what runs it."""
        return self.wrap is None and self.stand_in is None
