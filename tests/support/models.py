"""Small decoders: their configs and weights."""

from typing import Any

import torch
from torch import Tensor

from diffdeploy.config import AnyConfig, DecoderConfig, LayerConfig, MlpConfig
from tests.support.blocks import ROPE, make_config


def make_decoder(
    *, num_layers: int = 3, attention: AnyConfig | None = None, mlp: MlpConfig | None = None, **changes: Any
) -> DecoderConfig:
    """Layers that differ in lambda alone."""
    blocks = [
        attention or make_config(lambda_init=0.2 + 0.1 * n, output_scale=0.8 - 0.1 * n, rope=ROPE)
        for n in range(num_layers)
    ]
    layers = tuple(LayerConfig(attention=block, mlp=mlp or MlpConfig(hidden_dim=40)) for block in blocks)
    fields = {"vocab_size": 53, "embed_dim": blocks[0].embed_dim, "layers": layers, "norm_eps": 1e-5}
    return DecoderConfig(**{**fields, **changes})


def decoder_weights(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Float64, such that every layer matters as much as the one before."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_matrix = len(shape) == 2 and "embedding" not in name
        is_gain = name.endswith("norm.weight") or "subln" in name
        weights[name] = 1 + 0.1 * drawn if is_gain else drawn * (shape[-1] ** -0.5 if is_matrix else 0.3)
    return weights
