"""DiffLlama checkpoints against the model of transformers, and its scaled rotary tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.checkpoints import (
    CheckpointOptions,
    list_layers,
    read_checkpoint,
)
from diffdeploy.config import RopeConfig, RopeScaling
from diffdeploy.exact import rope_tables
from diffdeploy.modules import block_class
from diffdeploy.modules.rotary import RotaryEmbedding


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-mscale"],
)
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_diffllama_against_transformers(kv_heads: int, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    parameters = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_parameters=parameters,
    )
    model = DiffLlamaForCausalLM(config).double().train(mode=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert list_layers(tmp_path) == [0, 1, 2]
    captured: dict[int, Any] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, index=index: captured.update(
                {index: ((args[0] if args else kwargs["hidden_states"]), output[0])}
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(torch.randint(0, 32, (2, 150)))
    for index, (given, expected) in captured.items():
        found = read_checkpoint(tmp_path, CheckpointOptions(layer=index))
        block = block_class(found.config).from_weights(
            found.config, found.weights, max_positions=256, dtype=torch.float64
        )
        # transformers computes the rotary tables in fp32
        torch.testing.assert_close(block(given), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_scaling_is_computed_twice_alike(kind: Any) -> None:
    rope = RopeConfig(
        style="half",
        theta=500.0,
        scaling=RopeScaling(kind=kind, factor=8.0, original_max_position_embeddings=64),
    )
    module = RotaryEmbedding(rope, 32, 100, dtype=torch.float64)
    cos, sin = rope_tables(rope, 32, 100)
    np.testing.assert_allclose(module.cos.numpy(), cos, rtol=0, atol=1e-12)
    np.testing.assert_allclose(module.sin.numpy(), sin, rtol=0, atol=1e-12)
    plain = RotaryEmbedding(RopeConfig(style="half", theta=500.0), 32, 100, dtype=torch.float64)
    assert (module.cos - plain.cos).abs().max() > 0.1
