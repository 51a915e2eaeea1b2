"""The constants that a correct artifact may contain, in any format."""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import AnyConfig, is_lambda_vector
from diffdeploy.exact import lambda_of_heads, lambda_value, rope_tables
from diffdeploy.formats.registry import require_format

__all__ = ["expected_constants", "held_constants"]

_SHARED = ("softmax_scale", "norm_eps")


def expected_constants(manifest: Manifest, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Constants that a correct artifact may contain: weights in its dtype, and numbers and tables in float64.

    Names of constants of a model's layer have the prefix of its weights: ``layers.N.self_attn.lambda``.
    """
    expected = {name: array for name, array in weights.items() if not is_lambda_vector(name)}
    numbers: dict[str, Array] = {}
    for prefix, block in manifest.config.blocks.items():
        own = {name: weights[prefix + name] for name in block.weight_shapes()}
        found = _numbers(block, own)
        if prefix:
            # All layers share these numbers, which a format can find only by their values.
            found = {name: value for name, value in found.items() if name not in _SHARED}
        numbers |= {prefix + name: np.asarray(value, np.float64) for name, value in found.items()}
    attention = manifest.config.attention
    if attention.rope is not None:
        length = manifest.graph.axes["sequence_length"].max
        cos, sin = rope_tables(attention.rope, attention.head_dim, length)
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
    """Constants among `expected_constants` that the artifact of a correct bundle contains.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.
    """
    expected = expected_constants(bundle.manifest, weights)
    held = require_format(bundle.manifest.format).read_constants(bundle.path, expected)
    return {name: array for name, array in expected.items() if name in held}
