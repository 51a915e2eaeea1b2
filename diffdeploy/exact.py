"""Quantities in the formula, computed in numpy fp64 from config and weights: lambda, rotary tables and key map.

They do not use `diffdeploy.modules`, so that they can serve as an independent reference for exported graphs.
"""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyConfig, RopeConfig, RopeScaling

__all__ = ["key_head", "lambda_of_heads", "lambda_value", "rope_tables"]


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[Array, Array]:
    """Scaled cosines and sines of ``position * theta ** (-2j / r)``, each ``[length, r/2]``, float64."""
    width = rope.width(head_dim)
    angles = np.outer(np.arange(length), [_frequency(rope, j, width) for j in range(0, width, 2)])
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_scaling
    return np.cos(angles) * factor, np.sin(angles) * factor


def _frequency(rope: RopeConfig, channel: int, width: int) -> float:
    """Frequency of one channel; scalings follow the transformers library (``modeling_rope_utils``)."""
    plain, scaling = float(rope.theta ** -(channel / width)), rope.scaling
    if scaling is None:
        return plain
    if scaling.kind == "yarn":
        divided = _divided(rope, scaling, channel // 2, width)
        return float(plain / scaling.factor * divided + plain * (1.0 - divided))
    wavelength, context = 2 * np.pi / plain, scaling.original_max_position_embeddings
    if scaling.kind == "linear" or wavelength > context / scaling.low_freq_factor:
        return plain / scaling.factor
    if wavelength < context / scaling.high_freq_factor:
        return plain
    share = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return float((1 - share) * plain / scaling.factor + share * plain)


def _divided(rope: RopeConfig, scaling: RopeScaling, pair: int, width: int) -> float:
    """Degree to which frequencies are divided, from 0 (``beta_fast`` turns or more) to 1 (``beta_slow`` or fewer)."""

    def pair_with(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return float(width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(rope.theta)))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(np.floor(low)), float(np.ceil(high))
    low, high = max(low, 0.0), min(high, width - 1.0)
    # The source widens an empty ramp, which would otherwise divide by zero.
    high = high + 0.001 if low == high else high
    return float(np.clip((pair - low) / (high - low), 0.0, 1.0))


def lambda_of_heads(config: AnyConfig, weights: Mapping[str, Array]) -> Array:
    """Lambda of each head, ``[h]``, float64, for blocks whose lambda does not depend on the token.

    It is ``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init`` (arXiv 2410.05258, equation 2), or ``lambda_init`` itself.
    """
    assert config.lambda_init is not None
    if config.lambda_kind == "fixed":
        return np.full(config.num_heads, config.lambda_init)
    q1, k1, q2, k2 = (np.asarray(weights[f"lambda_{name}"], dtype=np.float64) for name in ("q1", "k1", "q2", "k2"))
    values = np.exp((q1 * k1).sum(-1)) - np.exp((q2 * k2).sum(-1)) + config.lambda_init
    return np.array(np.broadcast_to(values, (config.num_heads,)))


def lambda_value(config: AnyConfig, weights: Mapping[str, Array]) -> float:
    """The one lambda that all heads share, float64."""
    assert config.constant_lambda
    return float(lambda_of_heads(config, weights)[0])


def key_head(config: AnyConfig, head: int, stream: int) -> int:
    """Index of the key head, of ``num_key_streams``, that stream ``stream`` of query head ``head`` reads.

    Source: `DiffAttentionConfig.gqa_layout`.
    """
    if config.streams_share_keys:
        return head // config.group_size
    if config.gqa_layout == "legacy":
        return (2 * head + stream) // config.group_size
    return 2 * (head // config.group_size) + stream
