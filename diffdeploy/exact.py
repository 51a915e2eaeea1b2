"""Numbers of the formula in numpy fp64, from config and weights: lambda, the rotary tables, the key map.

They are computed apart from `diffdeploy.modules`, so that what is exported can be held against them.
"""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyConfig, RopeConfig, RopeScaling

__all__ = ["key_head", "lambda_value", "rope_tables"]


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[Array, Array]:
    """Cosines and sines of ``position * theta ** (-2j / d)``, scaled, each ``[length, d/2]``, float64."""
    angles = np.outer(np.arange(length), [_frequency(rope, j, head_dim) for j in range(0, head_dim, 2)])
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_scaling
    return np.cos(angles) * factor, np.sin(angles) * factor


def _frequency(rope: RopeConfig, channel: int, head_dim: int) -> float:
    """One frequency, as the transformers library defines the scalings (``modeling_rope_utils``)."""
    plain, scaling = float(rope.theta ** -(channel / head_dim)), rope.scaling
    if scaling is None:
        return plain
    if scaling.kind == "yarn":
        divided = _divided(rope, scaling, channel // 2, head_dim)
        return float(plain / scaling.factor * divided + plain * (1.0 - divided))
    wavelength, context = 2 * np.pi / plain, scaling.original_max_position_embeddings
    if scaling.kind == "linear" or wavelength > context / scaling.low_freq_factor:
        return plain / scaling.factor
    if wavelength < context / scaling.high_freq_factor:
        return plain
    share = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return float((1 - share) * plain / scaling.factor + share * plain)


def _divided(rope: RopeConfig, scaling: RopeScaling, pair: int, head_dim: int) -> float:
    """0 for pairs that turn ``beta_fast`` times in the original context and more, 1 for ``beta_slow`` and less."""

    def pair_with(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return float(head_dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(rope.theta)))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(np.floor(low)), float(np.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    # The source widens a ramp of no length, which would divide by zero.
    high = high + 0.001 if low == high else high
    return float(np.clip((pair - low) / (high - low), 0.0, 1.0))


def lambda_value(config: AnyConfig, weights: Mapping[str, Array]) -> float:
    """``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init`` in float64 (arXiv 2410.05258, equation 2)."""
    assert config.lambda_init is not None
    q1, k1, q2, k2 = (np.asarray(weights[f"lambda_{name}"], dtype=np.float64) for name in ("q1", "k1", "q2", "k2"))
    return float(np.exp(q1 @ k1) - np.exp(q2 @ k2) + config.lambda_init)


def key_head(config: AnyConfig, head: int, stream: int) -> int:
    """Which of the ``num_key_streams`` key heads stream ``stream`` of query head ``head`` reads.

    Source: `DiffAttentionConfig.gqa_layout`.
    """
    if config.streams_share_keys:
        return head // config.group_size
    if config.gqa_layout == "legacy":
        return (2 * head + stream) // config.group_size
    return 2 * (head // config.group_size) + stream
