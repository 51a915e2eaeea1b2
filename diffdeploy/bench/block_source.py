"""The block to measure: random, from a checkpoint, or from bundles, which must all hold the same one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from diffdeploy.bench.results import Block
from diffdeploy.bench.synthetic import random_checkpoint
from diffdeploy.bundle import Bundle, is_bundle, open_bundle, read_tensors
from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint
from diffdeploy.errors import InputError
from diffdeploy.graphs import DType, Variant

__all__ = ["BlockSource", "RandomSizes", "open_sources"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RandomSizes:
    """Sizes of a random block; ``None`` for the default of a size."""

    embed_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None

    @property
    def given(self) -> bool:
        """True if any size was given."""
        return (self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim) != (None,) * 4

    def checkpoint(self) -> Checkpoint:
        """Create the block; by default ``D`` is 1024, ``h`` is 8, ``h_kv = h`` and ``d = D / 2h``, as in the paper.

        Raises:
            InputError: the sizes are inconsistent.
        """
        embed_dim, num_heads = self.embed_dim or 1024, self.num_heads or 8
        if self.head_dim is None and embed_dim % (2 * num_heads):
            raise InputError(
                f"--embed-dim {embed_dim} is not a multiple of 2 * --num-heads {num_heads}; give --head-dim, too"
            )
        return random_checkpoint(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            head_dim=self.head_dim or embed_dim // num_heads // 2,
        )


@dataclass(frozen=True)
class BlockSource:
    """The block, with its origin.

    Attributes:
        checkpoint: config and weights of the block.
        bundles: bundles that were given.
        source: origin of the block, for the report.
        names: display name of each bundle.
    """

    checkpoint: Checkpoint
    bundles: tuple[Bundle, ...]
    source: str
    names: tuple[str, ...]

    def dtype(self, asked: DType | None) -> DType:
        """Dtype of the run: the requested one, else that of the bundles, else float32.

        Raises:
            InputError: the bundles have another dtype.
        """
        found = [bundle.manifest.graph.dtype for bundle in self.bundles]
        return _agreed("--dtype", asked, found, self.names) or "float32"

    def graph(self, asked: Variant | None) -> Variant:
        """Variant of the run: the requested one, else that of the bundles, else plain.

        Raises:
            InputError: the bundles have another variant.
        """
        found = [bundle.manifest.graph.variant for bundle in self.bundles]
        return _agreed("--graph", asked, found, self.names) or "plain"

    @property
    def longest(self) -> int | None:
        """Maximum number of positions that all bundles support, past included; ``None`` without bundles."""
        axes = [bundle.manifest.graph.axes for bundle in self.bundles]
        return min((each.get("total_sequence_length", each["sequence_length"]).max for each in axes), default=None)

    @property
    def block(self) -> Block:
        """Description of the block, for the report."""
        config = self.checkpoint.config
        return Block(
            source=self.source,
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            version=config.version,
            causal=config.causal,
            rope=None if config.rope is None else config.rope.style,
            sliding_window=config.sliding_window,
        )


def _agreed(option: str, asked: T | None, found: Sequence[T], names: Sequence[str]) -> T | None:
    wanted = asked if asked is not None or not found else found[0]
    for name, value in zip(names, found, strict=True):
        if value != wanted:
            raise InputError(f"{option} is {wanted}, but bundle {name} has {value}; measure them in separate runs")
    return wanted


def open_sources(
    paths: Sequence[Path], reading: CheckpointOptions, sizes: RandomSizes, public_key: Path | None = None
) -> BlockSource:
    """Open the given checkpoint and bundles.

    Args:
        paths: at most one checkpoint, and any number of bundles.
        reading: options for reading the checkpoint.
        sizes: sizes of a random block, if nothing is given.
        public_key: key that must have signed every bundle.

    Raises:
        InputError: a path cannot be opened, or the paths hold different blocks.
        IntegrityError: a bundle is damaged, or not signed by the key.
    """
    bundles = tuple(open_bundle(path, public_key) for path in paths if is_bundle(path))
    checkpoints = [path for path in paths if not is_bundle(path)]
    if len(checkpoints) > 1:
        raise InputError(
            f"{checkpoints[0]} and {checkpoints[1]} are two checkpoints; give one, and bundles made from it"
        )
    if paths and sizes.given:
        raise InputError(f"sizes are for a random block, but {paths[0]} has its own; omit one of them")
    # Refused rather than ignored, so that the user learns that such options have no effect.
    if public_key is not None and not bundles:
        raise InputError("--public-key is for checking bundles, but no bundle is given")
    if not checkpoints and reading.given():
        raise InputError(
            f"--{next(iter(reading.given())).replace('_', '-')} is for reading a checkpoint, but no checkpoint is given"
        )
    names = tuple(
        # Bundles of the same name in different folders are distinguished by their paths.
        bundle.path.name if [other.path.name for other in bundles].count(bundle.path.name) == 1 else str(bundle.path)
        for bundle in bundles
    )
    if checkpoints:
        checkpoint, source = read_checkpoint(checkpoints[0], reading), checkpoints[0].name
    elif bundles:
        checkpoint, source = _of_bundle(bundles[0]), names[0]
    else:
        checkpoint, source = sizes.checkpoint(), "random weights"
    for bundle, name in zip(bundles, names, strict=True):
        _require_same(checkpoint, bundle, name, source)
    return BlockSource(checkpoint, bundles, source, names)


def _of_bundle(bundle: Bundle) -> Checkpoint:
    weights = read_tensors(bundle)
    return Checkpoint(config=bundle.manifest.block, weights=weights, layout="bundle", layer=None, keys=[])


def _require_same(checkpoint: Checkpoint, bundle: Bundle, name: str, source: str) -> None:
    """Check that a bundle holds the same block, since ratios need equal sizes, and outputs share one exact result."""
    weights = _of_bundle(bundle).weights
    same = bundle.manifest.block == checkpoint.config and all(
        # In the dtype of the bundle, whose weights were cast when it was made.
        bool((checkpoint.weights[key].to(tensor.dtype) == tensor).all())
        for key, tensor in weights.items()
    )
    if not same:
        raise InputError(f"bundle {name} does not hold the block of {source}; measure them in separate runs")
