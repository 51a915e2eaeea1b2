"""Values of every stage of a block, computed in any dtype: the same formula, one stage at a time.

Shape suffixes: B batch, H heads, S query length, P past length, T = P + S key length, d stream width, e value width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.config import AnyConfig, RopeConfig
from diffdeploy.exact import key_head, lambda_of_heads, rope_tables
from diffdeploy.graphs import Stage

__all__ = ["StageValues", "stage_values"]

# A stage may have two values, such as rotated queries and keys, or the keys and values of the cache.
StageValues = dict[Stage, tuple[Tensor, ...]]


def stage_values(
    config: AnyConfig, weights: Mapping[str, Array], inputs: Mapping[str, Array], dtype: torch.dtype
) -> StageValues:
    """Compute all stages of differential attention, as in arXiv 2410.05258, equations 1 to 3, or of its second version.

    Args:
        config: config of the block.
        weights: canonical weights.
        inputs: inputs by the names of the graph.
        dtype: dtype of the computation: ``float64`` for exact values, the artifact's for the effect of rounding.

    Returns:
        Tensors ``[B, H, S, width]`` of the stages that the block has; ``[B, H, T, width]`` for the cache and
        ``[B, 1, S, D]`` for the output projection.
    """
    w = {name: to_tensor(array).to(dtype) for name, array in weights.items()}
    x_BSD = to_tensor(inputs["hidden_states"]).to(dtype)
    values: StageValues = {}
    q, k, v = (_projected(x_BSD, w, n, width) for n, width in zip("qkv", _widths(config), strict=True))
    values[Stage.Q_PROJECTION], values[Stage.K_PROJECTION], values[Stage.V_PROJECTION] = (q,), (k,), (v,)
    if config.qk_norm_eps is not None:
        q, k = (_rms_norm(side, config.qk_norm_eps) * w[f"{n}_norm.weight"] for n, side in (("q", q), ("k", k)))
    past_length = inputs["past_key_values.key"].shape[2] if "past_key_values.key" in inputs else 0
    if config.rope is not None:
        positions = _positions(inputs, past_length)
        q, k = _rotate(q, config.rope, positions), _rotate(k, config.rope, positions)
        values[Stage.ROPE] = (q, k)
    if "past_key_values.key" in inputs:
        pairs, v = (
            torch.cat((to_tensor(inputs[f"past_key_values.{name}"]).to(dtype), side), dim=2)
            for name, side in (("key", _pairs(config, k)), ("value", v))
        )
        values[Stage.CACHE] = (pairs, v)
        k = _streams(config, pairs)
    hidden = _hidden(config, x_BSD.shape[1], k.shape[2], inputs.get("attention_mask"))
    signal, noise = (_attention(config, q, k, v, hidden, stream) for stream in (0, 1))
    weighted = _lambda(config, weights, w, x_BSD) * noise
    heads = signal - weighted
    values |= {Stage.SIGNAL: (signal,), Stage.NOISE: (noise,), Stage.LAMBDA: (weighted,), Stage.DIFFERENCE: (heads,)}
    if config.norm_eps is not None:
        heads = _rms_norm(heads, config.norm_eps)
        heads = heads * w["subln.weight"] if "subln.weight" in w else heads
    if config.has_head_step:
        heads = heads * config.output_scale
        values[Stage.NORM] = (heads,)
    output = heads.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)
    values[Stage.OUTPUT_PROJECTION] = (output[:, None],)
    return values


def _pairs(config: AnyConfig, k_BHTd: Tensor) -> Tensor:
    """Pair the key streams, as in the cache: ``[B, h_kv, T, key_cache_dim]``."""
    num_streams = config.num_key_streams // config.num_kv_heads
    return torch.cat([k_BHTd[:, stream::num_streams] for stream in range(num_streams)], dim=-1)


def _streams(config: AnyConfig, pairs_BHTw: Tensor) -> Tensor:
    """Invert `_pairs`."""
    return torch.stack(torch.split(pairs_BHTw, config.head_dim, dim=-1), dim=2).flatten(1, 2)


def _widths(config: AnyConfig) -> tuple[int, int, int]:
    return config.head_dim, config.head_dim, config.value_dim


def _projected(x_BSD: Tensor, w: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    rows = x_BSD @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0.0)
    return rows.reshape(*x_BSD.shape[:2], -1, width).transpose(1, 2)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _positions(inputs: Mapping[str, Array], past_length: int) -> Tensor:
    if "position_ids" in inputs:
        return to_tensor(inputs["position_ids"])
    length = inputs["hidden_states"].shape[1]
    return torch.arange(past_length, past_length + length).expand(len(inputs["hidden_states"]), length)


def _rotate(x_BHSd: Tensor, rope: RopeConfig, positions_BS: Tensor) -> Tensor:
    width = rope.width(x_BHSd.shape[-1])
    tables = rope_tables(rope, x_BHSd.shape[-1], int(positions_BS.max()) + 1)
    cos, sin = (to_tensor(table)[positions_BS][:, None].to(x_BHSd.dtype) for table in tables)
    pairs = (
        (slice(0, width, 2), slice(1, width, 2))
        if rope.style == "interleaved"
        else (slice(width // 2), slice(width // 2, width))
    )
    a, b = (x_BHSd[..., part] for part in pairs)
    out = x_BHSd.clone()
    out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
    return out


def _hidden(config: AnyConfig, length: int, key_length: int, tokens: Array | None) -> Tensor:
    """Boolean ``[B or 1, S, T]``, ``True`` where a key is hidden from a query."""
    age = torch.arange(key_length - length, key_length)[:, None] - torch.arange(key_length)
    hidden = age < 0 if config.causal else torch.zeros_like(age, dtype=torch.bool)
    if config.sliding_window is not None:
        hidden = hidden | (age >= config.sliding_window)
    return hidden[None] if tokens is None else hidden | (to_tensor(tokens) == 0)[:, None]


def _attention(config: AnyConfig, q: Tensor, k: Tensor, v: Tensor, hidden_BST: Tensor, stream: int) -> Tensor:
    """Attention of one stream for all heads, one score matrix at a time; a fully masked query returns 0."""
    group = config.num_heads // config.num_kv_heads
    heads = [
        _softmax_times(
            q[:, 2 * i + stream], k[:, key_head(config, i, stream)], v[:, i // group], hidden_BST, config.scale
        )
        for i in range(config.num_heads)
    ]
    return torch.stack(heads, dim=1)


def _softmax_times(q_BSd: Tensor, k_BTd: Tensor, v_BTe: Tensor, hidden_BST: Tensor, scale: float) -> Tensor:
    scores = (q_BSd * scale) @ k_BTd.transpose(1, 2)
    wide = torch.promote_types(scores.dtype, torch.float32)
    dead = hidden_BST.all(dim=-1, keepdim=True)
    scores = scores.masked_fill(hidden_BST & ~dead, float("-inf"))
    attended: Tensor = scores.softmax(dim=-1, dtype=wide).to(scores.dtype) @ v_BTe
    return attended.masked_fill(dead, 0.0)


def _lambda(config: AnyConfig, weights: Mapping[str, Array], w: Mapping[str, Tensor], x_BSD: Tensor) -> Tensor:
    if config.lambda_kind != "token":
        return torch.from_numpy(lambda_of_heads(config, weights)).to(x_BSD.dtype)[:, None, None]
    per_token: Tensor = (x_BSD @ w["lambda_proj.weight"].T).sigmoid()
    return per_token.transpose(1, 2)[..., None]
