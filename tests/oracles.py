"""Independent formulas: loops over heads and rows in numpy fp64, sharing nothing with the package."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def softmax_row(scores: Array) -> Array:
    shifted = np.exp(scores - scores.max())
    row: Array = shifted / shifted.sum()
    return row


def attention(q: Array, k: Array, v: Array, *, causal: bool) -> Array:
    """One head, one stream: ``q [S, d]``, ``k [T, d]``, ``v [T, e]`` -> ``[S, e]``; causal is bottom-right."""
    rows = []
    for i in range(len(q)):
        seen = len(k) - len(q) + i + 1 if causal else len(k)
        rows.append(softmax_row(k[:seen] @ q[i] / np.sqrt(q.shape[1])) @ v[:seen])
    return np.stack(rows)


def diff_attention(q: Array, k: Array, v: Array, lam: float, *, causal: bool) -> Array:
    """``q [B, 2h, S, d]``, ``k [B, 2h_kv, T, d]``, ``v [B, h_kv, T, e]`` -> ``[B, h, S, e]``."""
    batch, heads, kv_heads = q.shape[0], q.shape[1] // 2, v.shape[1]
    out = np.empty((batch, heads, q.shape[2], v.shape[3]))
    for b in range(batch):
        for i in range(heads):
            j = i * kv_heads // heads
            signal = attention(q[b, 2 * i], k[b, 2 * j], v[b, j], causal=causal)
            noise = attention(q[b, 2 * i + 1], k[b, 2 * j + 1], v[b, j], causal=causal)
            out[b, i] = signal - lam * noise
    return out


def visible(queries: int, keys: int, *, causal: bool, window: int | None) -> Array:
    """``[S, T]``, 1 where query ``i`` may see key ``j``; causal is bottom-right."""
    table = np.zeros((queries, keys))
    for i in range(queries):
        for j in range(keys):
            age = keys - queries + i - j
            table[i, j] = (not causal or age >= 0) and (window is None or age < window)
    return table


def masked_diff_attention(
    q: Array, k: Array, v: Array, lam: Array, scores_bias: Array, *, legacy: bool = False
) -> Array:
    """The operator one row at a time.

    ``q [B, 2h, S, d]``, ``k [B, 2h_kv or h_kv, T, d]`` or, side by side, ``[B, h_kv, T, 2d]``, ``v [B, h_kv, T, e]``;
    ``lam`` and ``scores_bias`` (0, -inf where hidden, or any number) broadcastable to ``[B, h, S]`` and
    ``[B, 2h, S, T]`` -> ``[B, h, S, e]``.
    """
    batch, heads, kv_heads, length = q.shape[0], q.shape[1] // 2, v.shape[1], q.shape[2]
    group = heads // kv_heads
    lam = np.broadcast_to(lam, (batch, heads, length))
    bias = np.broadcast_to(scores_bias, (*q.shape[:3], k.shape[2]))
    out = np.zeros((batch, heads, length, v.shape[3]))
    for b, i, row, s in np.ndindex(batch, heads, length, 2):
        key = (2 * i + s) // group if legacy else 2 * (i // group) + s
        if k.shape[3] != q.shape[3]:  # head 2j of width d is the first half of pair j, head 2j + 1 the second
            read = np.split(k[b, key // 2], 2, axis=-1)[key % 2]
        else:
            read = k[b, i // group if k.shape[1] == kv_heads else key]
        scores = read @ q[b, 2 * i + s, row] / np.sqrt(q.shape[3]) + bias[b, 2 * i + s, row]
        if np.isneginf(scores).all():
            continue
        result = softmax_row(scores) @ v[b, i // group]
        out[b, i, row] += result if s == 0 else -lam[b, i, row] * result
    return out


def rotate(x: Array, style: str, theta: float) -> Array:
    """Turn channel pairs of ``[S, d]`` as complex numbers."""
    length, width = x.shape
    pairs = (
        x.reshape(length, -1, 2) if style == "interleaved" else np.stack((x[:, : width // 2], x[:, width // 2 :]), -1)
    )
    angles = np.arange(length)[:, None] / theta ** (np.arange(width // 2) * 2 / width)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    if style == "interleaved":
        return np.stack((turned.real, turned.imag), -1).reshape(length, width)
    return np.concatenate((turned.real, turned.imag), -1)


def block(
    x: Array,
    weights: dict[str, Array],
    *,
    heads: int,
    kv_heads: int,
    lambda_init: float,
    causal: bool,
    rope: tuple[str, float] | None,
    eps: float = 1e-5,
) -> Array:
    """The whole block for one sequence ``[S, D]``."""
    width = len(weights["lambda_q1"])

    def project(name: str, count: int) -> Array:
        rows = x @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0.0)
        return np.moveaxis(rows.reshape(len(x), count, -1), 1, 0)

    q, k, v = project("q", 2 * heads), project("k", 2 * kv_heads), project("v", kv_heads)
    if rope is not None:
        q, k = (np.stack([rotate(head, *rope) for head in side]) for side in (q, k))
    lam = lambda_init
    lam += float(np.exp(weights["lambda_q1"] @ weights["lambda_k1"]))
    lam -= float(np.exp(weights["lambda_q2"] @ weights["lambda_k2"]))
    out = diff_attention(q[None], k[None], v[None], lam, causal=causal)[0]
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + eps) * weights.get("subln.weight", np.ones(2 * width))
    joined = np.moveaxis(out * (1 - lambda_init), 0, 1).reshape(len(x), -1)
    result: Array = joined @ weights["out_proj.weight"].T + weights.get("out_proj.bias", 0.0)
    return result


def cached_block(
    x: Array,
    weights: dict[str, Array],
    key: Array,
    value: Array,
    *,
    lambda_init: float,
    rope: tuple[str, float],
    legacy: bool = False,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """The whole causal block for one sequence ``[S, D]`` behind a past, ``key`` and ``value`` ``[h_kv, P, 2d]``.

    A cached key is stream 1 of its head, then stream 2. Gives the output, and the keys and values of past and present.
    """
    kv_heads, past, width = key.shape[0], key.shape[1], key.shape[2] // 2

    def streams(name: str) -> list[Array]:
        rows = x @ weights[f"{name}_proj.weight"].T
        return [rows[:, start : start + width] for start in range(0, rows.shape[1], width)]

    def turned(head: Array) -> Array:  # at positions P, P + 1, ...
        return rotate(np.concatenate((np.zeros((past, width)), head)), *rope)[past:]

    q, k, v = [turned(head) for head in streams("q")], [turned(head) for head in streams("k")], streams("v")
    keys, values = (
        np.stack(
            [np.concatenate((old[j], np.concatenate((new[2 * j], new[2 * j + 1]), axis=1))) for j in range(kv_heads)]
        )
        for old, new in ((key, k), (value, v))
    )
    lam = lambda_init
    lam += float(np.exp(weights["lambda_q1"] @ weights["lambda_k1"]))
    lam -= float(np.exp(weights["lambda_q2"] @ weights["lambda_k2"]))
    bias = np.where(visible(len(x), past + len(x), causal=True, window=None) > 0, 0.0, -np.inf)
    out = masked_diff_attention(np.stack(q)[None], keys[None], values[None], np.array(lam), bias, legacy=legacy)[0]
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + eps) * weights["subln.weight"] * (1 - lambda_init)
    output: Array = np.moveaxis(out, 0, 1).reshape(len(x), -1) @ weights["out_proj.weight"].T
    return output, keys, values
