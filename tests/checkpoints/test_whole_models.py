"""Whole models out of checkpoints: transformers' DiffLlama, the sample, Motif, axolotl, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdeploy.checkpoints import holds_model, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import LayerConfig, MlpConfig
from diffdeploy.errors import InputError
from diffdeploy.modules import DiffTransformer
from tests.modules.test_decoder import formula
from tests.support.models import decoder_weights, make_decoder


def diffllama(directory: Path, **changes: Any) -> tuple[Any, Tensor, Tensor]:
    """A random model of transformers, saved; with token ids and their logits."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}
    fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "initializer_range": 0.2}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**{**sizes, **heads, **fields, **changes}))
    model.requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(directory)
    ids = torch.randint(0, 96, (2, 23))
    with torch.no_grad():
        return model, ids, model(ids).logits


def logits_of(directory: Path, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    found = read_model(directory)
    model = DiffTransformer.from_weights(found.config, found.weights, dtype=dtype, max_positions=128)
    logits: Tensor = model(ids)
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 12},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["plain", "tied", "biases", "head-dim", "llama3"],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    _, ids, expected = diffllama(tmp_path, **changes)
    assert holds_model(tmp_path)
    found = read_model(tmp_path)
    assert found.config.num_layers == 3
    assert found.config.tied is bool(changes.get("tie_word_embeddings", False))
    # transformers computes norms, tables and exponentials in fp32 whatever its dtype is.
    error = (logits_of(tmp_path, ids) - expected.double()).abs().max() / expected.abs().max()
    assert error < 5e-6


def test_old_rope_fields_are_read(tmp_path: Path) -> None:
    _, ids, expected = diffllama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (logits_of(tmp_path, ids) - expected.double()).abs().max() < 1e-4


def test_the_token_that_ends_texts_by_default_is_named(tmp_path: Path) -> None:
    diffllama(tmp_path)
    assert "eos_token_id" not in read_model(tmp_path).defaults
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path).defaults["eos_token_id"].startswith("2 of DiffLlamaConfig")
    assert "eos_token_id" not in read_model(SAMPLE).defaults


def test_the_sample_is_a_whole_model() -> None:
    found = read_model(SAMPLE)
    text = np.frombuffer(b"def main(argv=None):\n    parser = argparse.ArgumentParser(description=__doc__)\n", np.uint8)
    ids = text.astype(np.int64)
    model = DiffTransformer.from_weights(found.config, found.weights, dtype=torch.float64)
    logits = model(torch.from_numpy(ids)[None])[0]
    expected = formula(found.config, {name: w.double().numpy() for name, w in found.weights.items()}, ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)
    # It was trained on such text: 1.4 bits a byte, where guessing costs 8.
    bits = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:])).item() / np.log(2)
    assert bits < 2.5
    assert found.companions[0].name == "config.json"


def motif(directory: Path, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    """Motif's names over random weights of a decoder whose layers count from -1."""
    from diffdeploy.config import RopeConfig, lambda_init_at
    from tests.support.blocks import make_config

    blocks = [
        make_config(
            lambda_init=lambda_init_at(n - 1),
            output_scale=1 - lambda_init_at(n - 1),
            num_kv_heads=4,
            rope=RopeConfig(style="half", theta=500.0),
        )
        for n in range(3)
    ]
    mlp = MlpConfig(hidden_dim=40, kind="polynorm")
    config = make_decoder(tied=True, norm_eps=1e-6, layers=tuple(LayerConfig(attention=b, mlp=mlp) for b in blocks))
    weights = decoder_weights(config)
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn.act.": "mlp.act_fn.",
        "ffn.": "mlp.",
        "out_proj": "o_proj",
    }
    stored = {}
    for name, tensor in weights.items():
        key = names.get(name, f"model.{name}")
        for ours, theirs in list(names.items())[2:]:
            key = key.replace(ours, theirs)
        stored[key] = tensor.float()
    save_file(stored, directory / "model.safetensors")
    fields = {
        "model_type": "Motif",
        "vocab_size": 53,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "hidden_act": "poly_norm",
        "rms_norm_eps": 1e-6,
        "attn_rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return stored, config


def test_motif_with_its_polynorm(tmp_path: Path) -> None:
    _, config = motif(tmp_path)
    found = read_model(tmp_path)
    assert found.config == config
    ids = torch.randint(0, 53, (1, 9), generator=torch.Generator().manual_seed(0))
    weights = {name: tensor.float().double().numpy() for name, tensor in decoder_weights(config).items()}
    np.testing.assert_allclose(
        logits_of(tmp_path, ids)[0], formula(config, weights, ids[0].numpy()), rtol=0, atol=1e-10
    )


def test_axolotl_with_halves_of_split_heads(tmp_path: Path) -> None:
    """Llama with other attention: no output factor, and lambda_init a tensor of each layer."""
    from diffdeploy.checkpoints import write_checkpoint
    from diffdeploy.config import RopeConfig
    from tests.support.blocks import make_config

    # As float32, which is what the file holds.
    lambdas = [float(torch.tensor(value)) for value in (0.3, 0.41, 0.52)]
    rope = RopeConfig(style="half", theta=100.0)
    sizes = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5}
    blocks = [make_config(**sizes, lambda_init=value, output_scale=1.0, rope=rope) for value in lambdas]
    layers = tuple(LayerConfig(attention=block, mlp=MlpConfig(hidden_dim=40)) for block in blocks)
    config = make_decoder(layers=layers, norm_eps=1e-5, attention=blocks[0])
    weights = {name: tensor.float() for name, tensor in decoder_weights(config).items()}
    stored = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for number, block in enumerate(blocks):
        layer = f"layers.{number}."
        stored[f"model.{layer}input_layernorm.weight"] = weights[f"{layer}attention_norm.weight"]
        stored[f"model.{layer}post_attention_layernorm.weight"] = weights[f"{layer}ffn_norm.weight"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            stored[f"model.{layer}mlp.{name}.weight"] = weights[f"{layer}ffn.{name}.weight"]
        attention = {name: weights[f"{layer}self_attn.{name}"] for name in block.weight_shapes()}
        stored |= write_checkpoint(block, attention, "axolotl", prefix=f"model.{layer}self_attn.")
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, tmp_path / "model.safetensors")
    fields = {
        "model_type": "llama-differential",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "split_heads": True,
        "sublayer_norm": True,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_model(tmp_path).config == config
    ids = torch.randint(0, 53, (1, 9), generator=torch.Generator().manual_seed(0))
    exact = {name: tensor.double().numpy() for name, tensor in weights.items()}
    for number, value in enumerate(lambdas):
        # The formula is that of the paper, with a factor behind the norm that this code base lacks.
        exact[f"layers.{number}.self_attn.subln.weight"] /= 1 - value
    expected = formula(config, exact, ids[0].numpy())
    np.testing.assert_allclose(logits_of(tmp_path, ids)[0], expected, rtol=0, atol=1e-10)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 54}, "vocab_size in config.json is 54, but the embedding in .* has 53 rows"),
    "layers": ({"num_hidden_layers": 4}, r"has the layers 0, 1, 2; accepted: all from 0 to 3, as config.json says"),
    "width": ({"intermediate_size": 41}, "intermediate_size in config.json is 41"),
    "activation": ({"hidden_act": "silu"}, "hidden_act in config.json is 'silu', but the MLPs have PolyNorm's weights"),
    "eps": ({"rms_norm_eps": None}, "states rms_norm_eps, the epsilon of the norms around the blocks"),
    "untied": (
        {"tie_word_embeddings": False},
        "has an embedding, but lacks lm_head.weight, so it is not a whole model",
    ),
    "unsaid": ({"tie_word_embeddings": None}, "lacks lm_head.weight, and no config.json says"),
    "wrong": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings in config.json is 'yes'; accepted: true or false"),
    "capped": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping in config.json is 30.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_model_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    motif(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.norm.weight", "lacks model.norm.weight, so it is not a whole model"),
        ("model.layers.1.mlp.up_proj.weight", r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.layers.1.mlp.act_fn.bias", r"lacks model\.layers\.1\.mlp\.act_fn\.bias"),
        ("model.layers.1.self_attn.q_proj.weight", "layer 1 of .* has no block of layout motif"),
    ],
)
def test_a_missing_tensor_is_named(key: str, message: str, tmp_path: Path) -> None:
    stored, _ = motif(tmp_path)
    del stored[key]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_model(tmp_path)


def test_no_tensor_is_dropped(tmp_path: Path) -> None:
    stored, _ = motif(tmp_path)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(stored, tmp_path / "model.safetensors")
    read_model(tmp_path)
    stored["model.layers.2.mlp.router.weight"] = torch.ones(3)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"contains model\.layers\.2\.mlp\.router\.weight, which does not belong"):
        read_model(tmp_path)


def test_blocks_alone_are_no_model(tmp_path: Path) -> None:
    blocks = {key: tensor for key, tensor in load_file(SAMPLE / "model.safetensors").items() if "self_attn" in key}
    save_file(blocks, tmp_path / "blocks.safetensors")
    assert not holds_model(tmp_path / "blocks.safetensors")
    with pytest.raises(InputError, match="has no token embedding, so it is not a whole model"):
        read_model(tmp_path / "blocks.safetensors")


def test_weights_are_read_a_layer_at_a_time(tmp_path: Path) -> None:
    motif(tmp_path)
    found = read_model(tmp_path)
    assert list(found.weights) == list(found.config.weight_shapes())
    for name, tensor in found.weights.items():
        assert tuple(tensor.shape) == found.config.weight_shapes()[name]
