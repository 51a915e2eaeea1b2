"""The block's formula in numpy fp64, straight from the canonical weights; one score matrix at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdeploy.config import DiffAttentionConfig, RopeConfig

__all__ = ["lambda_value", "oracle", "rope_tables"]

Array = np.ndarray[Any, np.dtype[Any]]


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[Array, Array]:
    """Cosines and sines of ``position * theta ** (-2j / d)``, each ``[length, d/2]``, float64."""
    angles = np.outer(np.arange(length), rope.theta ** (-np.arange(0, head_dim, 2) / head_dim))
    return np.cos(angles), np.sin(angles)


def lambda_value(config: DiffAttentionConfig, weights: Mapping[str, Array]) -> float:
    """``exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init`` in float64 (arXiv 2410.05258, equation 2)."""
    q1, k1, q2, k2 = (np.asarray(weights[f"lambda_{name}"], dtype=np.float64) for name in ("q1", "k1", "q2", "k2"))
    return float(np.exp(q1 @ k1) - np.exp(q2 @ k2) + config.lambda_init)


def _rotate(x_SHd: Array, rope: RopeConfig) -> Array:
    length, _, width = x_SHd.shape
    cos, sin = (table[:, None] for table in rope_tables(rope, width, length))
    out = np.empty_like(x_SHd)
    evens, odds, lower, upper = slice(0, None, 2), slice(1, None, 2), slice(width // 2), slice(width // 2, None)
    a, b = (evens, odds) if rope.style == "interleaved" else (lower, upper)
    out[..., a] = x_SHd[..., a] * cos - x_SHd[..., b] * sin
    out[..., b] = x_SHd[..., b] * cos + x_SHd[..., a] * sin
    return out


def _softmax_times(q_Sd: Array, k_Sd: Array, v_Se: Array, causal: bool) -> Array:
    scores = q_Sd @ k_Sd.T / np.sqrt(q_Sd.shape[1])
    if causal:
        scores[np.triu_indices(len(scores), 1)] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    product: Array = scores @ v_Se / scores.sum(axis=1, keepdims=True)
    return product


def oracle(config: DiffAttentionConfig, weights: Mapping[str, Array], x_BSD: Array) -> Array:
    """Differential attention as in arXiv 2410.05258, equations 1 to 3.

    Args:
        config: of the block.
        weights: canonical weights, any floating dtype.
        x_BSD: ``[B, S, D]``, any floating dtype.

    Returns:
        ``[B, S, D]``, float64.
    """
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    lam = lambda_value(config, w)
    out = np.empty(x_BSD.shape, dtype=np.float64)
    for b, x_SD in enumerate(np.asarray(x_BSD, dtype=np.float64)):
        q, k, v = (x_SD @ w[f"{n}_proj.weight"].T + w.get(f"{n}_proj.bias", 0.0) for n in "qkv")
        q, k = (side.reshape(len(x_SD), -1, config.head_dim) for side in (q, k))
        v = v.reshape(len(x_SD), -1, config.value_dim)
        if config.rope is not None:
            q, k = _rotate(q, config.rope), _rotate(k, config.rope)
        heads = []
        for i in range(config.num_heads):
            j = i // config.group_size
            signal, noise = (_softmax_times(q[:, 2 * i + s], k[:, 2 * j + s], v[:, j], config.causal) for s in (0, 1))
            head = signal - lam * noise
            head /= np.sqrt(np.mean(head**2, axis=1, keepdims=True) + config.norm_eps)
            heads.append(head * w.get("subln.weight", 1.0) * config.output_scale)
        out[b] = np.concatenate(heads, axis=1) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)
    return out
