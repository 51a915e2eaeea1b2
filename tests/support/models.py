"""Small decoders: their configs and weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffdeploy
from diffdeploy.config import AnyConfig, DecoderConfig, LayerConfig, MlpConfig
from tests.support.blocks import ROPE, make_config


def make_decoder(
    *, num_layers: int = 3, attention: AnyConfig | None = None, mlp: MlpConfig | None = None, **changes: Any
) -> DecoderConfig:
    """Config of a decoder whose layers differ only in lambda."""
    blocks = [
        attention or make_config(lambda_init=0.2 + 0.1 * n, output_scale=0.8 - 0.1 * n, rope=ROPE)
        for n in range(num_layers)
    ]
    layers = tuple(LayerConfig(attention=block, mlp=mlp or MlpConfig(hidden_dim=40)) for block in blocks)
    fields = {"vocab_size": 53, "embed_dim": blocks[0].embed_dim, "layers": layers, "norm_eps": 1e-5}
    return DecoderConfig(**{**fields, **changes})


def require_greedy_tokens_of_transformers(bundle: Path, model: Any) -> None:
    """Check that a batch padded on the left is continued as transformers continues it.

    Args:
        bundle: bundle of a model with at least 96 tokens and 29 positions.
        model: transformers model from which the bundle was made.
    """
    ids = torch.randint(8, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :1] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with diffdeploy.load(bundle) as runtime:
        found = runtime.generate(ids, mask, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(found, expected)


def decoder_weights(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in float64, scaled so that every layer matters as much as the one before."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_matrix = len(shape) == 2 and "embedding" not in name
        is_gain = name.endswith("norm.weight") or "subln" in name
        weights[name] = 1 + 0.1 * drawn if is_gain else drawn * (shape[-1] ** -0.5 if is_matrix else 0.3)
    return weights
