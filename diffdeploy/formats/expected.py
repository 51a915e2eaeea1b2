"""The constants that a right artifact can hold, whatever its format."""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import LAMBDA_VECTORS, AnyConfig
from diffdeploy.exact import lambda_of_heads, lambda_value, rope_tables
from diffdeploy.formats.registry import require_format

__all__ = ["expected_constants", "held_constants"]


def expected_constants(manifest: Manifest, weights: Mapping[str, Array]) -> dict[str, Array]:
    """What a right artifact can hold: weights in its dtype, and all numbers and tables in float64."""
    expected = {name: array for name, array in weights.items() if name not in LAMBDA_VECTORS}
    numbers = {name: np.asarray(value, np.float64) for name, value in _numbers(manifest.block, weights).items()}
    if manifest.block.rope is not None:
        length = manifest.graph.axes["sequence_length"].max
        cos, sin = rope_tables(manifest.block.rope, manifest.block.head_dim, length)
        numbers |= {"rope.cos": cos, "rope.sin": sin}
    return {**expected, **numbers}


def _numbers(config: AnyConfig, weights: Mapping[str, Array]) -> dict[str, float | Array]:
    numbers: dict[str, float | Array] = {"softmax_scale": config.scale}
    if config.constant_lambda:
        numbers["lambda"] = lambda_value(config, weights)
    elif config.lambda_kind == "head":
        numbers["lambda"] = lambda_of_heads(config, weights)
    if config.norm_eps is not None:
        numbers["norm_eps"] = config.norm_eps
    if config.has_head_step:
        numbers["output_scale"] = config.output_scale
    return numbers


def held_constants(bundle: Bundle, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Those of `expected_constants` that the artifact of a right bundle holds.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.
    """
    expected = expected_constants(bundle.manifest, weights)
    held = require_format(bundle.manifest.format).read_constants(bundle.path, expected)
    return {name: array for name, array in expected.items() if name in held}
