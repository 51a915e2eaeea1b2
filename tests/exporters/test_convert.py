"""Models of other code bases as DiffLlama checkpoints: what transformers computes with them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import ModelCheckpoint, read_model, shards, write_checkpoint
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import (
    DecoderConfig,
    DiffAttentionConfig,
    DiffAttentionV2Config,
    MlpConfig,
    RopeConfig,
    RopeScaling,
    lambda_init_at,
)
from diffdeploy.errors import InputError, VerificationError
from diffdeploy.exporters import ExportOptions, convert, convert_model, export_bundle
from diffdeploy.runtime.generation import eos_of
from tests.checkpoints.test_whole_models import diffllama
from tests.modules.test_decoder import formula
from tests.oracles import Array
from tests.support.blocks import make_config
from tests.support.models import decoder_weights, make_decoder

INTERLEAVED, HALF = RopeConfig(style="interleaved", theta=500.0), RopeConfig(style="half", theta=500.0)
NUM_TOKENS = 24


def paper(**changes: Any) -> DecoderConfig:
    """Three layers with the paper's lambda_init; fields of the model, its MLPs and its blocks may be given."""
    of_model = {name: changes.pop(name) for name in ("tied", "norm_eps", "mlp") if name in changes}
    if "head_norm_eps" in changes:
        changes["norm_eps"] = changes.pop("head_norm_eps")
    blocks = [
        make_config(lambda_init=lambda_init_at(n), **{"output_scale": 1 - lambda_init_at(n), **changes})
        for n in range(3)
    ]
    return with_blocks(make_decoder(attention=blocks[0], **of_model), [vars(block) for block in blocks])


def with_blocks(config: DecoderConfig, changes: list[dict[str, Any]]) -> DecoderConfig:
    """The decoder with other fields in each of its blocks."""
    layers = []
    for layer, fields in zip(config.layers, changes, strict=True):
        assert isinstance(layer.attention, DiffAttentionConfig)
        layers.append(replace(layer, attention=replace(layer.attention, **fields)))
    return replace(config, layers=tuple(layers))


def in_memory(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> ModelCheckpoint:
    weights = {name: tensor.to(dtype) for name, tensor in decoder_weights(config).items()}
    return ModelCheckpoint(config=config, weights=weights, layout="none", keys=list(weights))


def own_names(directory: Path) -> tuple[Path, ModelCheckpoint]:
    """As `scripts/train_sample.py` writes models, with grouped heads and gamma."""
    found = in_memory(paper(rope=INTERLEAVED))
    save_file(dict(found.weights), directory / "model.safetensors")
    fields = {"rope": {"style": "interleaved", "theta": 500.0}, "norm_eps": 1e-5, "gqa_layout": "canonical"}
    (directory / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    return directory, found


def axolotl(directory: Path) -> tuple[Path, ModelCheckpoint]:
    """Llama's names with axolotl's blocks: halves, gamma, no factor behind the norm, lambda_init in float32."""
    stored = [float(np.float32(lambda_init_at(n))) for n in range(3)]
    config = paper(rope=HALF, output_scale=1.0, tied=True)
    found = in_memory(with_blocks(config, [{"lambda_init": init} for init in stored]))
    names = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    parts = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    state = {f"{new}.weight": found.weights[f"{old}.weight"] for old, new in names.items()}
    for n, layer in enumerate(found.config.layers):
        own = {k.removeprefix(f"layers.{n}."): w for k, w in found.weights.items() if k.startswith(f"layers.{n}.")}
        block = {k.removeprefix("self_attn."): w for k, w in own.items() if k.startswith("self_attn.")}
        prefix = f"model.layers.{n}."
        state |= write_checkpoint(layer.attention, block, "axolotl", prefix=f"{prefix}self_attn.")
        state |= {f"{prefix}{new}.weight": own[f"{old}.weight"] for old, new in parts.items()}
        state |= {f"{prefix}mlp.{part}_proj.weight": own[f"ffn.{part}_proj.weight"] for part in ("gate", "up", "down")}
    save_file(state, directory / "model.safetensors")
    fields = {"model_type": "llama-differential", "rms_norm_eps": 1e-5, "rope_theta": 500.0, "eos_token_id": 7}
    (directory / "config.json").write_text(
        json.dumps({**fields, "tie_word_embeddings": True, "max_position_embeddings": 64})
    )
    return directory, found


def expected_logits(found: ModelCheckpoint, ids: Array) -> Array:
    """By the formula of the tests, which has the paper's factor behind the norm of the heads."""
    weights = {name: tensor.double().numpy() for name, tensor in found.weights.items()}
    for n, layer in enumerate(found.config.layers):
        name = f"layers.{n}.self_attn.subln.weight"
        if name in weights:
            weights[name] = weights[name] * layer.attention.output_scale / (1 - (layer.attention.lambda_init or 0.0))
    return formula(found.config, weights, ids)


def transformers_model(directory: Path) -> Any:
    from transformers import DiffLlamaForCausalLM

    loaded: Any = DiffLlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values()), loading
    return model


def assert_same_model(model: Any, found: ModelCheckpoint, *, error: float = 5e-6) -> None:
    """Logits of transformers in float32 are those of the formula, and so are greedy tokens whose margin tells."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, found.config.vocab_size, (1, 11), generator=generator)
    tokens = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.shape == (1, 11 + NUM_TOKENS)
    exact = expected_logits(found, tokens[0].numpy())
    with torch.no_grad():
        logits = model(tokens).logits[0].double().numpy()
    bound = error * np.abs(exact).max()
    assert np.abs(logits - exact).max() < bound
    second, first = np.sort(exact[10:-1], axis=-1)[:, -2:].T
    clear = first - second > 2 * bound
    assert clear.sum() > NUM_TOKENS / 2
    np.testing.assert_array_equal(exact[10:-1].argmax(axis=-1)[clear], tokens[0, 11:].numpy()[clear])


def test_the_sample_runs_in_transformers(tmp_path: Path) -> None:
    found = read_model(SAMPLE)
    done = convert_model(found, tmp_path / "out")
    assert done.weight_files == ["model.safetensors"]
    assert_same_model(transformers_model(tmp_path / "out"), found)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (SAMPLE / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("make", [own_names, axolotl])
def test_other_layouts_run_in_transformers(
    make: Callable[[Path], tuple[Path, ModelCheckpoint]], tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    source, made = make(tmp_path / "source")
    convert_model(read_model(source), tmp_path / "out")
    model = transformers_model(tmp_path / "out")
    assert_same_model(model, made)
    assert model.config.tie_word_embeddings is made.config.tied
    assert model.config.eos_token_id == (7 if make is axolotl else None)


CONFIGS = {
    "interleaved-biases": paper(rope=INTERLEAVED, qkv_bias=True, out_bias=True),
    "biases-of-qkv-alone": paper(rope=INTERLEAVED, qkv_bias=True),
    "bias-of-the-output-alone": paper(rope=HALF, out_bias=True),
    "no-gamma-tied": paper(rope=HALF, norm_affine=False, tied=True),
    "heads-of-their-own-width": paper(rope=INTERLEAVED, head_dim=8, num_kv_heads=1),
    "no-groups": paper(rope=INTERLEAVED, num_kv_heads=4, gqa_layout="legacy"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_diffllama_can_hold_runs_in_transformers(name: str, tmp_path: Path) -> None:
    found = in_memory(CONFIGS[name])
    convert_model(found, tmp_path / "out")
    assert_same_model(transformers_model(tmp_path / "out"), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    found = in_memory(paper(rope=INTERLEAVED), dtype)
    convert_model(found, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert transformers_model(tmp_path / "out").dtype == dtype
    # Rounded once: the product in fp64 of what was given.
    weights = {k.removeprefix("layers.1.self_attn."): w.double() for k, w in found.weights.items() if "layers.1." in k}
    product = weights["out_proj.weight"].reshape(24, 4, 12) * weights["subln.weight"]
    assert torch.equal(stored["model.layers.1.self_attn.o_proj.weight"], product.reshape(24, 48).to(dtype))


SCALED = {"factor": 8.0, "original_max_position_embeddings": 32}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED},
    "yarn": {"rope_type": "yarn", **SCALED},
    "yarn-mscale": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, **SCALED},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_diffllama_checkpoint_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    parameters = {"rope_theta": 500.0, **SCALINGS[name]}
    changes: dict[str, Any] = {"attention_bias": True, "head_dim": 12, "eos_token_id": [3, 4], "pad_token_id": 5}
    model, ids, logits = diffllama(tmp_path / "in", rope_parameters=parameters, **changes)
    convert_model(read_model(tmp_path / "in"), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = transformers_model(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=0 if name != "yarn-mscale" else 1e-5)
    same = ("max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id", "bos_token_id", "head_dim")
    assert all(getattr(again.config, field) == getattr(model.config, field) for field in same)
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.write_shards, "__kwdefaults__", {"max_bytes": 20_000})
    found = in_memory(paper(rope=INTERLEAVED))
    done = convert_model(found, tmp_path / "out")
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    assert len(done.weight_files) > 3
    assert done.weight_files[0] == f"model-00001-of-{len(done.weight_files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(done.weight_files)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == done.weight_files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.weights.values()) - 3 * 12 * 4
    assert_same_model(transformers_model(tmp_path / "out"), found)


def test_the_tokenizer_of_transformers_reads_what_is_copied(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert_model(read_model(SAMPLE), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert bytes(tokenizer("def main(")["input_ids"]).decode() == "def main("


REFUSED: dict[str, tuple[DecoderConfig, str]] = {
    "polynorm": (
        paper(rope=HALF, mlp=MlpConfig(hidden_dim=40, kind="polynorm")),
        "layer 0 has an MLP with PolyNorm, but DiffLlama has SwiGLU",
    ),
    "mlp-bias": (paper(rope=HALF, mlp=MlpConfig(hidden_dim=40, bias=True)), "has biases in its MLP"),
    "window": (paper(rope=HALF, sliding_window=4), "has a sliding window of 4 keys, but DiffLlama has none"),
    "eps": (paper(rope=HALF, norm_eps=1e-6), "has epsilon 1e-05 in the norm of the heads and 1e-06 in the other norms"),
    "no-norm": (paper(rope=HALF, head_norm_eps=None, norm_affine=False), "has no norm of the heads"),
    "no-rope": (paper(rope=None), "has no rotary embedding"),
    "partial": (
        paper(rope=RopeConfig(style="half", theta=100.0, rotary_dim=4)),
        "has a rotary embedding of 4 of 6 channels",
    ),
    "legacy": (paper(rope=HALF, gqa_layout="legacy"), "has the legacy key map"),
    "qk-norm": (paper(rope=HALF, qk_norm_eps=1e-6), "has norms of queries and keys"),
    "scale": (paper(rope=HALF, softmax_scale=0.3), "has a softmax scale of 0.3, but DiffLlama has 0.408248"),
    "values": (paper(rope=HALF, value_head_dim=10), "has values of width 10, but DiffLlama has values of 12"),
    "by-head": (paper(rope=HALF, lambda_kind="head"), "has a lambda for each head"),
    "fixed": (paper(rope=HALF, lambda_kind="fixed"), "has a fixed lambda"),
    "lambda-init": (make_decoder(), r"layer 1 has lambda_init 0.3, but DiffLlama has the paper's value, 0.355509"),
    "second": (
        make_decoder(attention=DiffAttentionV2Config(embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, rope=HALF)),
        "layer 0 has differential attention of the second version",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffllama_cannot_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    with pytest.raises(InputError, match=rf"^DiffLlama cannot represent this model: .*{message}"):
        convert_model(in_memory(config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mlps_of_different_widths_are_refused(tmp_path: Path) -> None:
    config = paper(rope=HALF)
    layers = (*config.layers[:2], replace(config.layers[2], mlp=MlpConfig(hidden_dim=48)))
    with pytest.raises(InputError, match="layer 2 has an MLP of width 48, and layer 0 one of 40"):
        convert_model(in_memory(replace(config, layers=layers)), tmp_path / "out")


def test_a_projection_that_overflows_is_refused(tmp_path: Path) -> None:
    found = in_memory(paper(rope=HALF), torch.float16)
    name = "layers.2.self_attn."
    weights = dict(found.weights)
    weights[f"{name}subln.weight"] = torch.full((12,), 6e4, dtype=torch.float16)
    weights[f"{name}out_proj.weight"] = weights[f"{name}out_proj.weight"] * 10
    with pytest.raises(InputError, match=r"too large for torch\.float16"):
        convert_model(replace(found, weights=weights), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def swapped_streams(weights: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    swapped = weights["q_proj.weight"].reshape(-1, 2, head_dim, 24).flip(1).reshape(-1, 24)
    return {**weights, "q_proj.weight": swapped}


FAULTS: dict[str, Callable[[dict[str, Tensor], int], dict[str, Tensor]]] = {
    "rows-as-they-were": lambda weights, _: dict(weights),
    "streams-swapped": swapped_streams,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_conversion_is_not_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdeploy.checkpoints.diffllama.by_halves", FAULTS[name])
    with pytest.raises(
        VerificationError, match="the written checkpoint computes different logits, and was not kept: B1-S33"
    ):
        convert_model(in_memory(paper(rope=INTERLEAVED)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_config_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = RopeScaling(kind="linear", factor=2.0)
    config = paper(rope=RopeConfig(style="half", theta=100.0, scaling=scaling))
    monkeypatch.setattr("diffdeploy.checkpoints.diffllama._SCALING", {"linear": ("factor", "low_freq_factor")})
    convert_model(in_memory(config), tmp_path / "out")  # fields that a kind does not have say nothing
    monkeypatch.setattr(convert, "diffllama_config", lambda given: given)
    with pytest.raises(VerificationError, match="when read back, has a different config"):
        convert_model(in_memory(config), tmp_path / "wrong")


def test_the_record_says_what_it_was_made_from(tmp_path: Path) -> None:
    done = convert_model(read_model(SAMPLE), tmp_path / "out")
    stored = convert.ConversionRecord.model_validate_json((tmp_path / "out" / convert.RECORD).read_text())
    assert stored == done.record
    assert stored.provenance.files.keys() == {"model.safetensors"}
    assert [case.id for case in stored.cases] == ["B1-S33-normal", "B2-S7-left-normal", "B2-S17-positions-normal"]
    # The weight of the norms alone was rounded anew.
    assert 0 < (done.record.worst.budget_used or 0) < 0.5


@pytest.mark.slow
def test_a_model_without_a_last_token_stays_one(tmp_path: Path) -> None:
    # Absent, it would be 2 to the class of transformers and to the runtime; the sample means a byte by it.
    convert_model(read_model(SAMPLE), tmp_path / "out")
    options = ExportOptions(graph="model", max_batch_size=2, max_sequence_length=16)
    export_bundle(read_model(tmp_path / "out"), tmp_path / "bundle", options, verify=False)
    assert eos_of(open_bundle(tmp_path / "bundle")) == ()
