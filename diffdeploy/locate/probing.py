"""Chosen inputs for an artifact, its outputs, and the exact values of every stage.

Shape suffixes: B batch, S positions, H heads, e value width, D model width.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from diffdeploy.arrays import Array, epsilon, to_array
from diffdeploy.bundle import Bundle, read_weights
from diffdeploy.graphs import Stage
from diffdeploy.locate.values import stage_values

__all__ = ["EQUATIONS", "INVERTED", "MOST", "TINY", "Answer", "Prober", "Runs", "null_spaces", "same"]

# Tolerance in multiples of the dtype's spacing, relative to the compared values: rounding in several stages explains
# smaller differences. Correct blocks of random sizes used half of it in float32 and a sixth in half precision; one,
# with a lambda of 0.98, used 1.9 times as much. Wrong steps and weights in float32 are off by a median of 2,000 times
# as much.
_ROUNDINGS = 256

# Maximum condition number of the output projection, which is the factor by which inverting the projection loses
# precision. 1e4 roundings are a third
# of what `INVERTED` allows; correct blocks with condition numbers up to 2,300 used a quarter of it.
_WORST_CONDITION = 1e4

# Inverting the output projection multiplies rounding errors: comparisons after it get this many times the tolerance.
INVERTED = 64.0

# Share of the elements that a fit must explain. Correct explanations fitted all of them, wrong ones less than one in a
# hundred; the difference from 1 allows for outliers.
MOST = 0.99

# Heads of tokens of this size have squares near 1e-6, below the usual epsilon of a norm.
TINY = 1e-3

# Number of equations per unknown of a fit, so that a wrong model cannot satisfy them all.
EQUATIONS = 3

# With more rows per call, fewer calls are needed; a fit needs hundreds of tokens.
_MOST_ROWS = 32

# Smaller than the size of any token, so that it is the divisor only for a token of 0, which stays 0.
_SMALLEST_SIZE = 1e-30


class Runs(Protocol):
    """Interface of an artifact that can be run."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs by name."""
        ...


class Answer:
    """The artifact's outputs for one input, and the exact values of every stage, in float64."""

    def __init__(self, given: dict[str, Array], exact: Mapping[Stage, tuple[Array, ...]], tolerance: float) -> None:
        self.given, self._exact, self._tolerance = given, exact, tolerance

    def stage(self, stage: Stage) -> Array:
        """Exact value of a stage, ``[B, H, S, width]``."""
        (value,) = self._exact[stage]
        return value

    def wanted(self, name: str) -> Array:
        """Exact output of that name."""
        if name == "output":
            return self._exact[Stage.OUTPUT_PROJECTION][0][:, 0]
        return self._exact[Stage.CACHE][0 if name == "present.key" else 1]

    @property
    def right(self) -> bool:
        """True if the artifact's output is the exact one."""
        return same(self.given["output"], self.wanted("output"), self._tolerance)


class Prober:
    """Creates inputs and runs the artifact on them.

    Args:
        bundle: bundle of the artifact.
        artifact: object that runs inputs.

    Attributes:
        config: config of the block.
        weights: canonical weights, float64.
        tolerance: relative error that rounding explains.
        batch_size: number of rows of an input.
        takes_positions: true if tokens can have any position.
        has_cache: true if keys and values are returned.
        shows_heads: true if the output projection can be inverted.
    """

    def __init__(self, bundle: Bundle, artifact: Runs) -> None:
        self.config, self._spec = bundle.manifest.block, bundle.manifest.graph
        self.weights = {name: array.astype(np.float64) for name, array in read_weights(bundle).items()}
        self.tolerance = _ROUNDINGS * epsilon(self._spec.dtype)
        self.batch_size = min(_MOST_ROWS, self._spec.axes["batch_size"].max)
        self.takes_positions = "position_ids" in self._spec.inputs
        self.has_cache = self._spec.variant == "cached"
        self._artifact = artifact
        # A fixed seed, so that the same artifact always gets the same verdict.
        self._generator = np.random.default_rng(0)
        projection = self.weights["out_proj.weight"]
        self._inverse = np.linalg.pinv(projection)
        # If heads are wider than outputs, some heads have no effect on any output.
        self.shows_heads = projection.shape[0] >= projection.shape[1] and np.linalg.cond(projection) < _WORST_CONDITION

    def ask(self, x_BSD: Array, *, position: int | None = None, past_length: int = 0) -> Answer:
        """Run an input.

        Args:
            x_BSD: hidden states.
            position: position of all tokens; by default they follow the past.
            past_length: number of random tokens in the cache.
        """
        inputs = self._inputs(x_BSD, position, past_length)
        given = {name: array.astype(np.float64) for name, array in self._artifact.run(inputs).items()}
        exact = stage_values(self.config, self.weights, inputs, torch.float64)
        return Answer(given, {stage: tuple(map(to_array, value)) for stage, value in exact.items()}, self.tolerance)

    def tokens(self, length: int) -> Array:
        """Random hidden states ``[B, S, D]``."""
        return self._generator.standard_normal((self.batch_size, length, self.config.embed_dim))

    def tokens_in(self, basis: Array) -> Array:
        """Random hidden states ``[B, D]`` of the usual size, in the space spanned by a basis ``[n, D]``."""
        points = self._generator.standard_normal((self.batch_size, len(basis))) @ basis
        sizes = np.sqrt(np.mean(np.square(points), axis=-1, keepdims=True))
        unit: Array = points / np.maximum(sizes, _SMALLEST_SIZE)
        return unit

    def heads(self, output: Array) -> Array:
        """Normalised heads ``[B, H, S, e]`` whose projections are nearest to the outputs ``[B, S, D]``."""
        joined = (output - self.weights.get("out_proj.bias", 0.0)) @ self._inverse.T
        return joined.reshape(*output.shape[:2], self.config.num_heads, -1).transpose(0, 2, 1, 3)

    def directions(self, output: Array) -> Array:
        """Normalised heads without the norm's weight and factor: the differential heads, except for their lengths."""
        directions: Array = self.heads(output) / (self.weights.get("subln.weight", 1.0) * self.config.output_scale)
        return directions

    def same(self, given: Array, wanted: Array, *, slack: float = 1.0, share: float = 1.0) -> bool:
        """See `same`; ``slack`` multiplies the tolerance after inverting the output projection."""
        return same(given, wanted, slack * self.tolerance, share)

    def _inputs(self, x_BSD: Array, position: int | None, past_length: int) -> dict[str, Array]:
        spec, (batch, length) = self._spec, x_BSD.shape[:2]
        inputs = {"hidden_states": x_BSD.astype(spec.dtype)}
        if "attention_mask" in spec.inputs:
            inputs["attention_mask"] = np.ones((batch, past_length + length), np.int64)
        if self.takes_positions:
            counted = np.arange(past_length, past_length + length)
            positions = counted if position is None else np.full(length, position)
            inputs["position_ids"] = np.tile(positions.astype(np.int64), (batch, 1))
        for name in ("past_key_values.key", "past_key_values.value"):
            if name in spec.inputs:
                _, heads, _, width = spec.inputs[name].shape
                shape = (batch, int(heads), past_length, int(width))
                inputs[name] = self._generator.standard_normal(shape).astype(spec.dtype)
        return inputs


def same(given: Array, wanted: Array, tolerance: float, share: float = 1.0) -> bool:
    """True if that share of the elements differs by at most the tolerance times their typical size; false for NaN."""
    # The size is that of all elements together, since single ones may be near 0.
    size = float(np.sqrt(np.mean(np.square(wanted)))) or 1.0
    return bool(np.mean(np.abs(given - wanted) <= tolerance * size) >= share)


def null_spaces(rows: Array) -> Array | None:
    """Bases ``[n, rest, D]`` of the null spaces of ``rows [n, r, D]``; ``None`` if they may be empty."""
    rank = rows.shape[1]
    # Linearly dependent rows would leave more dimensions; the ones taken here are in the null space in any case.
    if rank >= rows.shape[2]:
        return None
    # The right singular vectors beyond the rank span the null space.
    return np.stack([np.linalg.svd(matrix)[2][rank:] for matrix in rows])
