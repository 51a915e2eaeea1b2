"""The attention of further code bases, each by its own head numbering, in loops and numpy fp64.

Written from descriptions of those projects; nothing is permuted to a canonical order, and nothing is shared with the
package. Each function takes hidden states ``x [S, D]`` and the tensors of one block by the source's own keys.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = Mapping[str, Array]


def linear(x: Array, w: Weights, name: str) -> Array:
    out: Array = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", np.zeros(1))
    return out


def attention(q: Array, k: Array, v: Array, hidden: Array, scale: float) -> Array:
    """``q [S, d]``, ``k [T, d]``, ``v [T, e]``, ``hidden [S, T]``; a query that sees nothing gives 0."""
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if not hidden[i, j]]
        if seen:
            scores = np.array([float(q[i] @ k[j]) * scale for j in seen])
            weights = np.exp(scores - scores.max())
            out[i] = (weights / weights.sum()) @ v[seen]
    return out


def causal_mask(length: int) -> Array:
    return np.triu(np.ones((length, length)), 1)


def no_mask(length: int) -> Array:
    return np.zeros((length, length))


def rms(x: Array, eps: float, weight: Array | float = 1.0) -> Array:
    out: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return out


def layer_norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    out: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return out


def turned(x: Array, theta: float, *, sign: float = 1.0, width: int | None = None) -> Array:
    """Rows ``x [S, d]`` at positions 0, 1, ...: pairs ``(j, j + w/2)`` of the first ``w`` channels."""
    width = x.shape[1] if width is None else width
    out = x.copy()
    for position in range(len(x)):
        for j in range(width // 2):
            angle = sign * position * theta ** (-2 * j / width)
            a, b = x[position, j], x[position, j + width // 2]
            out[position, j] = a * np.cos(angle) - b * np.sin(angle)
            out[position, j + width // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def exponent(w: Weights, pair: int) -> Array:
    out: Array = np.exp((w[f"lambda_q{pair}"] * w[f"lambda_k{pair}"]).sum(-1))
    return out


def decay(depth: int) -> float:
    return float(0.8 - 0.6 * np.exp(-0.3 * depth))


def diffclip(x: Array, w: Weights, *, num_heads: int, causal: bool) -> Array:
    """``num_heads`` counts the softmax heads of equal size; pairs are neighbours; lambda_init is 0.8 in all layers."""
    heads, width = num_heads // 2, x.shape[1] // num_heads
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")
    hidden = causal_mask(len(x)) if causal else no_mask(len(x))
    lam = exponent(w, 1) - exponent(w, 2) + 0.8
    parts = []
    for i in range(heads):
        value = v[:, 2 * i * width : 2 * (i + 1) * width]
        streams = [
            attention(q[:, block], k[:, block], value, hidden, width**-0.5)
            for block in (slice(n * width, (n + 1) * width) for n in (2 * i, 2 * i + 1))
        ]
        parts.append(rms(streams[0] - lam * streams[1], 1e-5, w["diff_norm.weight"]) * (1 - 0.8))
    return linear(np.concatenate(parts, -1), w, "out_proj")


def grouped(
    x: Array, w: Weights, *, num_heads: int, noise_heads: int, kv_pairs: int, width: int, theta: float, layer: int
) -> Array:
    """Motif-2-12.7B: in each group some signal heads, then one noise head that all of them share."""
    ratio = (num_heads - noise_heads) // noise_heads
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")

    def row(side: Array, number: int) -> Array:
        return turned(side[:, number * width : (number + 1) * width], theta)

    hidden, factor = causal_mask(len(x)), 1 - decay(layer - 1)
    lam = exponent(w, 1) - exponent(w, 2) + decay(layer - 1)
    parts = []
    for n in range(noise_heads):
        j = n // (noise_heads // kv_pairs)
        value = v[:, 2 * j * width : 2 * (j + 1) * width]
        noise = attention(row(q, n * (ratio + 1) + ratio), row(k, 2 * j + 1), value, hidden, width**-0.5)
        for s in range(ratio):
            signal = attention(row(q, n * (ratio + 1) + s), row(k, 2 * j), value, hidden, width**-0.5)
            parts.append(rms(signal - lam * noise, 1e-5, w["subln.weight"]) * factor)
    return linear(np.concatenate(parts, -1), w, "o_proj")


def axolotl_split(x: Array, w: Weights, *, num_heads: int, num_kv_heads: int, theta: float, eps: float) -> Array:
    """Split mode: the second half of all heads is noise, values are cut in halves of heads; lambda_init is stored."""
    heads, kv_heads = num_heads // 2, num_kv_heads // 2
    width = w["q_proj.weight"].shape[0] // num_heads
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")

    def row(side: Array, number: int) -> Array:
        return side[:, number * width : (number + 1) * width]

    lam = exponent(w, 1) - exponent(w, 2) + w["lambda_init"]
    parts = []
    for i in range(heads):
        j = i * kv_heads // heads
        value = np.concatenate((row(v, j), row(v, kv_heads + j)), -1)
        signal, noise = (
            attention(
                turned(row(q, s * heads + i), theta),
                turned(row(k, s * kv_heads + j), theta),
                value,
                causal_mask(len(x)),
                width**-0.5,
            )
            for s in (0, 1)
        )
        head = signal - lam * noise
        parts.append(rms(head, eps, w["subln.weight"]) if "subln.weight" in w else head)
    return linear(np.concatenate(parts, -1), w, "o_proj")


def axolotl_doubled(x: Array, w: Weights, *, num_heads: int, num_kv_heads: int, theta: float, eps: float) -> Array:
    """Doubled mode: projections of q and k twice as large, the second half is noise; values of width d."""
    width = w["q_proj.weight"].shape[0] // (2 * num_heads)
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")

    def row(side: Array, number: int) -> Array:
        return side[:, number * width : (number + 1) * width]

    lam = exponent(w, 1) - exponent(w, 2) + w["lambda_init"]
    parts = []
    for i in range(num_heads):
        j = i * num_kv_heads // num_heads
        signal, noise = (
            attention(
                turned(row(q, s * num_heads + i), theta),
                turned(row(k, s * num_kv_heads + j), theta),
                row(v, j),
                causal_mask(len(x)),
                width**-0.5,
            )
            for s in (0, 1)
        )
        head = signal - lam * noise
        parts.append(rms(head, eps, w["subln.weight"]) if "subln.weight" in w else head)
    return linear(np.concatenate(parts, -1), w, "o_proj")


def replay(x: Array, w: Weights, *, num_heads: int, lambda_init: float, hidden: Array) -> Array:
    """RePlay: lambda per head, a stored scale, values of a width of their own, and the mask of the caller."""
    width = w["W_q.weight"].shape[0] // (2 * num_heads)
    value_width = w["W_v.weight"].shape[0] // num_heads
    q, k, v = (linear(x, w, f"W_{n}") for n in "qkv")
    lam = exponent(w, 1) - exponent(w, 2) + lambda_init
    parts = []
    for i in range(num_heads):
        value = v[:, i * value_width : (i + 1) * value_width]
        signal, noise = (
            attention(q[:, block], k[:, block], value, hidden, float(w["scaling"]))
            for block in (slice((2 * i + s) * width, (2 * i + s + 1) * width) for s in (0, 1))
        )
        parts.append(rms(signal - lam[i] * noise, 1e-5, w["rms_scale"]) * (1 - lambda_init))
    return linear(np.concatenate(parts, -1), w, "W_o")


def differential_vit(x: Array, w: Weights, *, num_heads: int, depth: int, norm: str) -> Array:
    """Differential_ViT: Microsoft's keys, not causal, and a norm without weight: RMS, or LayerNorm without apex."""
    width = x.shape[1] // num_heads // 2
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")
    lam, parts = exponent(w, 1) - exponent(w, 2) + decay(depth), []
    for i in range(num_heads):
        value = v[:, 2 * i * width : 2 * (i + 1) * width]
        signal, noise = (
            attention(q[:, block], k[:, block], value, no_mask(len(x)), width**-0.5)
            for block in (slice((2 * i + s) * width, (2 * i + s + 1) * width) for s in (0, 1))
        )
        head = signal - lam * noise
        parts.append((rms(head, 1e-5) if norm == "rms" else layer_norm(head, 1e-5)) * (1 - decay(depth)))
    return linear(np.concatenate(parts, -1), w, "out_proj")


def without_norm(x: Array, w: Weights, *, num_heads: int, lam: Array) -> Array:
    """Microsoft's keys, not causal, and heads as they are."""
    width = x.shape[1] // num_heads // 2
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")
    parts = []
    for i in range(num_heads):
        value = v[:, 2 * i * width : 2 * (i + 1) * width]
        signal, noise = (
            attention(q[:, block], k[:, block], value, no_mask(len(x)), width**-0.5)
            for block in (slice((2 * i + s) * width, (2 * i + s + 1) * width) for s in (0, 1))
        )
        parts.append(signal - lam * noise)
    return linear(np.concatenate(parts, -1), w, "out_proj")


def blagpt(x: Array, w: Weights, *, num_heads: int, num_kv_heads: int, depth: int, theta: float) -> Array:
    """BlaGPT's first version: Microsoft's keys, but the rotary embedding turns by minus the angle."""
    width = w["q_proj.weight"].shape[0] // (2 * num_heads)
    q, k, v = (linear(x, w, f"{n}_proj") for n in "qkv")

    def row(side: Array, number: int) -> Array:
        return turned(side[:, number * width : (number + 1) * width], theta, sign=-1.0)

    lam, parts = exponent(w, 1) - exponent(w, 2) + decay(depth), []
    for i in range(num_heads):
        j = i * num_kv_heads // num_heads
        value = v[:, 2 * j * width : 2 * (j + 1) * width]
        signal, noise = (
            attention(row(q, 2 * i + s), row(k, 2 * j + s), value, causal_mask(len(x)), width**-0.5) for s in (0, 1)
        )
        parts.append(rms(signal - lam * noise, 1e-5, w["subln.weight"]) * (1 - decay(depth)))
    return linear(np.concatenate(parts, -1), w, "out_proj")


def blagpt_v2(x: Array, w: Weights, *, num_heads: int, num_kv_heads: int, theta: float, norm_eps: float) -> Array:
    """BlaGPT's second version: keys and values from one projection, norms of queries and keys, lambda per token."""
    width = w["q_proj.weight"].shape[0] // (2 * num_heads)
    q, kv = linear(x, w, "q_proj"), linear(x, w, "kv_proj")
    k, v = kv[:, : num_kv_heads * width], kv[:, num_kv_heads * width :]
    lam = 1 / (1 + np.exp(-(x @ w["lambda_proj.weight"].T)))

    def row(side: Array, number: int, norm: str | None) -> Array:
        part = side[:, number * width : (number + 1) * width]
        if norm is None:
            return part
        if f"{norm}.weight" in w:
            part = rms(part, norm_eps, w[f"{norm}.weight"])
        return turned(part, theta, sign=-1.0)

    parts = []
    for i in range(num_heads):
        j = i * num_kv_heads // num_heads
        signal, noise = (
            attention(
                row(q, 2 * i + s, "q_norm"), row(k, j, "k_norm"), row(v, j, None), causal_mask(len(x)), width**-0.5
            )
            for s in (0, 1)
        )
        parts.append(signal - lam[:, i : i + 1] * noise)
    return linear(np.concatenate(parts, -1), w, "c_proj")


def stable_audio(x: Array, w: Weights, *, num_heads: int, rotary_width: int = 32, theta: float = 1e4) -> Array:
    """Stable Audio 3's self-attention: lambda is 1, no head norm, values of width d, a part of the channels turns."""
    embed_dim = x.shape[1]
    width = embed_dim // num_heads
    q, k, v, q_noise, k_noise = np.split(linear(x, w, "to_qkv"), 5, axis=-1)

    def row(side: Array, i: int, norm: str) -> Array:
        part = rms(side[:, i * width : (i + 1) * width], 1e-6, w[f"{norm}.weight"])
        return turned(part, theta, width=rotary_width)

    parts = []
    for i in range(num_heads):
        value, hidden = v[:, i * width : (i + 1) * width], no_mask(len(x))
        signal = attention(row(q, i, "q_norm"), row(k, i, "k_norm"), value, hidden, width**-0.5)
        noise = attention(row(q_noise, i, "q_norm"), row(k_noise, i, "k_norm"), value, hidden, width**-0.5)
        parts.append(signal - noise)
    return linear(np.concatenate(parts, -1), w, "to_out")
