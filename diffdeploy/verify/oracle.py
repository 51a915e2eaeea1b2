"""The block's formula in numpy fp64, straight from the canonical weights; one score matrix at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdeploy.config import DiffAttentionConfig, RopeConfig

__all__ = ["oracle"]

Array = np.ndarray[Any, np.dtype[Any]]


def _rotate(x_SHd: Array, rope: RopeConfig) -> Array:
    length, _, width = x_SHd.shape
    angles = np.outer(np.arange(length), rope.theta ** (-np.arange(0, width, 2) / width))[:, None]
    out = np.empty_like(x_SHd)
    half = width // 2
    first, second = (
        (np.s_[..., 0::2], np.s_[..., 1::2])
        if rope.style == "interleaved"
        else (
            np.s_[..., :half],
            np.s_[..., half:],
        )
    )
    out[first] = x_SHd[first] * np.cos(angles) - x_SHd[second] * np.sin(angles)
    out[second] = x_SHd[second] * np.cos(angles) + x_SHd[first] * np.sin(angles)
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
    lam = np.exp(w["lambda_q1"] @ w["lambda_k1"]) - np.exp(w["lambda_q2"] @ w["lambda_k2"]) + config.lambda_init
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
