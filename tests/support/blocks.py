"""Small blocks: their configs, weights, checkpoints and inputs."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import AnyConfig, DiffAttentionConfig, DiffAttentionV2Config, RopeConfig
from diffdeploy.modules import AttentionBlock, KeyValueCache, block_class


def make_config(**changes: Any) -> DiffAttentionConfig:
    fields: dict[str, Any] = {
        "embed_dim": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "lambda_init": 0.35,
        "output_scale": 0.65,
        "rope": RopeConfig(style="interleaved", theta=100.0),
    }
    return DiffAttentionConfig(**{**fields, **changes})


ROPE = RopeConfig(style="half", theta=100.0)
# Properties of blocks in other code bases. The first has a lambda per head, and its own scale and value width; the
# second has heads without a norm, a fixed lambda, and rotates only part of the channels.
PER_HEAD = make_config(lambda_kind="head", value_head_dim=10, softmax_scale=0.3, causal=False, rope=None)
PLAIN_HEADS = make_config(
    lambda_kind="fixed",
    lambda_init=1.0,
    value_head_dim=6,
    norm_eps=None,
    norm_affine=False,
    output_scale=1.0,
    qk_norm_eps=1e-6,
    rope=RopeConfig(style="half", theta=100.0, rotary_dim=4),
)
BLOCK_CONFIGS: dict[str, AnyConfig] = {
    "v1": make_config(),
    "v1-legacy": make_config(gqa_layout="legacy", rope=ROPE),
    "v1-window": make_config(sliding_window=3),
    "v2": DiffAttentionV2Config(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, rope=ROPE),
    "per-head": replace(PER_HEAD, causal=True),
    "plain-heads": PLAIN_HEADS,
}

EXPORT_CONFIGS: dict[str, AnyConfig] = {
    "legacy": make_config(gqa_layout="legacy"),
    "legacy-odd": make_config(gqa_layout="legacy", num_heads=3, num_kv_heads=1),
    "window": make_config(sliding_window=4),
    "full": make_config(causal=False, rope=None, qkv_bias=True, out_bias=True),
    "v2": DiffAttentionV2Config(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, rope=ROPE),
    "v2-norms": DiffAttentionV2Config(
        embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, rope=ROPE, qk_norm_eps=1e-6
    ),
    "per-head": PER_HEAD,
    "plain-heads": PLAIN_HEADS,
}


def random_weights(config: AnyConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = config.embed_dim**-0.5
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        * (0.2 if name.startswith("lambda") else scale)
        for name, shape in config.weight_shapes().items()
    }


def checkpoint_of(config: AnyConfig, seed: int = 0) -> Checkpoint:
    weights = {name: tensor.float() for name, tensor in random_weights(config, seed).items()}
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


def make_block(name: str, impl: str = "auto", dtype: torch.dtype = torch.float64) -> AttentionBlock:
    config = BLOCK_CONFIGS[name]
    return block_class(config).from_weights(config, random_weights(config), impl=impl, max_positions=64, dtype=dtype)


def random_states(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 24, generator=generator, dtype=torch.float64).to(dtype)


def empty_cache(block: AttentionBlock, batch: int, dtype: torch.dtype = torch.float64) -> KeyValueCache:
    config = block.config
    return (
        torch.empty(batch, config.num_kv_heads, 0, config.key_cache_dim, dtype=dtype),
        torch.empty(batch, config.num_kv_heads, 0, config.value_dim, dtype=dtype),
    )
