"""Every layout: detected, read to the function of its source, and written back bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.checkpoints import (
    Checkpoint,
    CheckpointOptions,
    list_layers,
    read_checkpoint,
    summarise,
    write_checkpoint,
)
from diffdeploy.config import DiffAttentionConfig, GqaLayout, RopeConfig, RopeScaling, RopeStyle, lambda_init_at
from diffdeploy.errors import InputError
from diffdeploy.exact import rope_tables
from diffdeploy.modules import block_class
from diffdeploy.modules.rotary import RotaryEmbedding
from tests import oracles
from tests.source_oracles import HALVES, PAIRS, REPEATED, Reads, Shape, forward

RATIOS = [(4, 4), (4, 2), (4, 1), (6, 2), (3, 1)]
LAYER, LENGTH = 3, 6


def random_state(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(size, generator=generator, dtype=torch.float64) * (0.2 if "lambda" in name else 0.5)
        for name, size in shapes.items()
    }


def lambdas(shape: Shape, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}lambda_{name}": (shape.width,) for name in ("q1", "k1", "q2", "k2")}


def separate(shape: Shape, output: str, *, bias: bool = False, norm: str | None = None) -> dict[str, tuple[int, ...]]:
    rows = {"q": 2 * shape.heads * shape.width, "k": 2 * shape.kv_heads * shape.width}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {f"{n}_proj.weight": (count, shape.embed_dim) for n, count in rows.items()}
    shapes |= {f"{n}_proj.bias": (count,) for n, count in rows.items() if bias}
    shapes[f"{output}.weight"] = (shape.embed_dim, rows["q"])
    if bias:
        shapes[f"{output}.bias"] = (shape.embed_dim,)
    return shapes | lambdas(shape) | ({norm: (2 * shape.width,)} if norm else {})


def packed(shape: Shape, name: str, output: str, *, bias: bool) -> dict[str, tuple[int, ...]]:
    rows = 2 * (shape.heads + 2 * shape.kv_heads) * shape.width
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (rows, shape.embed_dim),
        f"{output}.weight": (shape.embed_dim, 2 * shape.heads * shape.width),
    }
    return shapes | ({f"{name}.bias": (rows,), f"{output}.bias": (shape.embed_dim,)} if bias else {})


class Source:
    """A code base: how its blocks are stored, and what they compute."""

    def __init__(
        self,
        layout: str,
        shapes: Callable[[Shape], dict[str, tuple[int, ...]]],
        reads: Reads,
        *,
        output: str,
        fields: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        prefix: str = f"model.layers.{LAYER}.self_attn.",
        pack: str | None = None,
        vectors: str = "",
        norm: str | None = None,
        depth: int = LAYER,
        **rules: Any,
    ) -> None:
        self.layout, self.shapes, self.reads, self.output = layout, shapes, reads, output
        self.fields, self.options, self.prefix = fields or {}, CheckpointOptions(**(options or {})), prefix
        self.pack, self.vectors, self.norm, self.depth, self.rules = pack, vectors, norm, depth, rules

    def run(self, state: dict[str, Tensor], shape: Shape, x: Any) -> Any:
        w = {name.removeprefix(self.prefix): tensor.numpy() for name, tensor in state.items()}
        if self.pack:
            rows = x @ w[f"{self.pack}.weight"].T + w.get(f"{self.pack}.bias", 0.0)
            q_rows, kv_rows = 2 * shape.heads * shape.width, 2 * shape.kv_heads * shape.width
            projections = rows[:, :q_rows], rows[:, q_rows : q_rows + kv_rows], rows[:, q_rows + kv_rows :]
        else:
            q, k, v = (x @ w[f"{n}_proj.weight"].T + w.get(f"{n}_proj.bias", 0.0) for n in "qkv")
            projections = q, k, v
        lambda_init = lambda_init_at(self.depth)
        if "lambda_a" in w:
            lam = np.exp(w["lambda_a"]) - np.exp(w["lambda_b"]) + lambda_init
        else:
            q1, k1, q2, k2 = (w[f"{self.vectors}lambda_{n}"] for n in ("q1", "k1", "q2", "k2"))
            lam = np.exp(q1 @ k1) - np.exp(q2 @ k2) + lambda_init
        return forward(
            x,
            shape,
            self.reads,
            projections,
            float(lam),
            lambda_init,
            output=(w[f"{self.output}.weight"], w.get(f"{self.output}.bias", 0.0)),
            gamma=w[self.norm] if self.norm else 1.0,
            head_norms=(w["q_norm.weight"], w["k_norm.weight"]) if "q_norm.weight" in w else None,
            **self.rules,
        )


GIVEN = {"rope": "interleaved", "rope_theta": 100.0}
HF = {"rms_norm_eps": 1e-6, "rope_theta": 100.0}
SOURCES = {
    "microsoft-flash": Source(
        "microsoft",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        PAIRS,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "gqa_layout": "canonical"},
        rope=("interleaved", 100.0),
    ),
    "microsoft-naive": Source(
        "microsoft",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        REPEATED,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "gqa_layout": "legacy"},
        rope=("interleaved", 100.0),
    ),
    "microsoft-early": Source(
        "microsoft",
        lambda c: separate(c, "out_proj"),
        PAIRS,
        output="out_proj",
        options={"rope": "none", "gqa_layout": "canonical"},
    ),
    "sdpadiff": Source(
        "sdpadiff",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        REPEATED,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "layout": "sdpadiff"},
        rope=("interleaved", 100.0),
    ),
    "diffdeploy": Source(
        "diffdeploy",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        PAIRS,
        output="out_proj",
        norm="subln.weight",
        fields={"model_type": "diffdeploy", "rope": {"style": "half", "theta": 100.0}, "norm_eps": 1e-4},
        rope=("half", 100.0),
        eps=1e-4,
    ),
    "diffllama": Source(
        "diffllama",
        lambda c: separate(c, "o_proj"),
        HALVES,
        output="o_proj",
        fields={"model_type": "diffllama", **HF},
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "diffllama-bias": Source(
        "diffllama",
        lambda c: separate(c, "o_proj", bias=True),
        HALVES,
        output="o_proj",
        fields={"model_type": "diffllama", **HF},
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "phi4flash": Source(
        "phi4flash",
        lambda c: (
            packed(c, "Wqkv", "out_proj", bias=True)
            | lambdas(c, "inner_cross_attn.")
            | {"inner_cross_attn.subln.weight": (2 * c.width,)}
        ),
        PAIRS,
        output="out_proj",
        pack="Wqkv",
        vectors="inner_cross_attn.",
        norm="inner_cross_attn.subln.weight",
        prefix=f"model.layers.{LAYER}.attn.",
        fields={"model_type": "phi4flash", "sliding_window": 3, "num_hidden_layers": 32},
        window=3,
    ),
    "motif": Source(
        "motif",
        lambda c: separate(c, "o_proj", norm="subln.weight"),
        PAIRS,
        output="o_proj",
        norm="subln.weight",
        fields={"model_type": "motif", "attn_rms_norm_eps": 1e-6, "rope_theta": 100.0},
        depth=LAYER - 1,
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "timm": Source(
        "timm",
        lambda c: packed(c, "qkv", "proj", bias=True) | lambdas(c) | {"sub_norm.weight": (2 * c.width,)},
        PAIRS,
        output="proj",
        pack="qkv",
        norm="sub_norm.weight",
        prefix=f"blocks.{LAYER}.attn.",
        causal=False,
    ),
    "timm-dual": Source(
        "timm-dual",
        lambda c: (
            packed(c, "qkv", "proj", bias=False)
            | {"lambda_a": (), "lambda_b": (), "sub_norm.weight": (2 * c.width,)}
            | {"q_norm.weight": (c.width,), "k_norm.weight": (c.width,)}
        ),
        PAIRS,
        output="proj",
        pack="qkv",
        norm="sub_norm.weight",
        prefix=f"blocks.{LAYER}.attn.",
        causal=False,
    ),
}


def store(folder: Path, source: Source, shape: Shape) -> dict[str, Tensor]:
    state = random_state(source.shapes(shape), source.prefix)
    save_file(state, folder / "model.safetensors")
    if source.fields:
        (folder / "config.json").write_text(json.dumps(source.fields))
    return state


def run_block(found: Checkpoint, x: Any) -> Any:
    block = block_class(found.config).from_weights(
        found.config, found.weights, impl="two_call", max_positions=16, dtype=torch.float64
    )
    return block(torch.from_numpy(x)[None])[0].numpy()


def inputs(shape: Shape) -> Any:
    return np.random.default_rng(1).standard_normal((LENGTH, shape.embed_dim))


def shape_of(name: str, heads: int, kv_heads: int) -> Shape:
    return Shape(20, heads, heads if name.startswith("timm") else kv_heads, 4)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("heads", "kv_heads"), RATIOS, ids=str)
def test_reads_to_the_function_of_the_source(name: str, heads: int, kv_heads: int, tmp_path: Path) -> None:
    source, shape = SOURCES[name], shape_of(name, heads, kv_heads)
    state = store(tmp_path, source, shape)
    found = read_checkpoint(tmp_path, source.options)
    assert (found.layout, found.layer) == (source.layout, LAYER)
    x = inputs(shape)
    np.testing.assert_allclose(run_block(found, x), source.run(state, shape, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("heads", "kv_heads"), RATIOS, ids=str)
def test_round_trip_is_bit_for_bit(name: str, heads: int, kv_heads: int, tmp_path: Path) -> None:
    source = SOURCES[name]
    state = store(tmp_path, source, shape_of(name, heads, kv_heads))
    found = read_checkpoint(tmp_path, source.options)
    back = write_checkpoint(found.config, found.weights, source.layout, prefix=source.prefix)
    assert back.keys() == state.keys() == set(found.keys)
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (name, fault)
        for name in SOURCES
        for fault in ("pairing", "rope", "depth", "key map")
        if fault != "key map" or not name.startswith("timm")  # without grouped heads there is one key map
    ],
)
def test_a_wrong_reading_is_seen(name: str, fault: str, tmp_path: Path) -> None:
    """The comparison above can fail: it does for halves taken for pairs, another rotation, depth or key map."""
    source, shape = SOURCES[name], shape_of(name, 4, 2)
    state = store(tmp_path, source, shape)
    found = read_checkpoint(tmp_path, source.options)
    config = found.config
    assert isinstance(config, DiffAttentionConfig)
    if fault == "pairing":
        q = found.weights["q_proj.weight"].reshape(4, 2, 4, 20).transpose(0, 1).reshape(32, 20)
        wrong = replace(found, weights={**found.weights, "q_proj.weight": q})
    elif fault == "rope":
        style: RopeStyle = "half" if config.rope is None or config.rope.style == "interleaved" else "interleaved"
        wrong = replace(found, config=replace(config, rope=RopeConfig(style=style, theta=100.0)))
    elif fault == "depth":
        value = lambda_init_at(source.depth + 1)
        wrong = replace(found, config=replace(config, lambda_init=value, output_scale=1 - value))
    else:
        other: GqaLayout = "canonical" if config.gqa_layout == "legacy" else "legacy"
        wrong = replace(found, config=replace(config, gqa_layout=other))
    x = inputs(shape)
    assert np.abs(run_block(wrong, x) - source.run(state, shape, x)).max() > 1e-3


def test_version_2(tmp_path: Path) -> None:
    shapes = {"q_proj.weight": (48, 20), "k_proj.weight": (12, 20), "v_proj.weight": (12, 20)}
    state = random_state({**shapes, "o_proj.weight": (20, 24), "lambda_proj.weight": (4, 20)}, "layers.1.attn.")
    save_file(state, tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path, CheckpointOptions(rope="interleaved", rope_theta=100.0))
    assert found.layout == "microsoft-v2"
    x = np.random.default_rng(1).standard_normal((LENGTH, 20))
    w = {name.removeprefix("layers.1.attn."): tensor.numpy() for name, tensor in state.items()}
    q, k, v = (np.moveaxis((x @ w[f"{n}_proj.weight"].T).reshape(LENGTH, -1, 6), 1, 0) for n in "qkv")
    q, k = (np.stack([oracles.rotate(head, "interleaved", 100.0) for head in side]) for side in (q, k))
    lam = 1 / (1 + np.exp(-x @ w["lambda_proj.weight"].T))
    heads = []
    for i in range(4):
        signal, noise = (oracles.attention(q[2 * i + s], k[i // 2], v[i // 2], causal=True) for s in (0, 1))
        heads.append(signal - lam[:, i : i + 1] * noise)
    np.testing.assert_allclose(
        run_block(found, x), np.concatenate(heads, axis=1) @ w["o_proj.weight"].T, rtol=0, atol=1e-10
    )
    back = write_checkpoint(found.config, found.weights, "microsoft-v2", prefix="layers.1.attn.")
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    assert back.keys() == state.keys()


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
    ],
    ids=["default", "linear", "llama3"],
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


@pytest.mark.parametrize("kind", ["linear", "llama3"])
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


def test_gqa_layout_is_asked_for_only_where_it_matters(tmp_path: Path) -> None:
    source = SOURCES["microsoft-flash"]
    store(tmp_path, source, Shape(20, 4, 4, 4))
    assert read_checkpoint(tmp_path, CheckpointOptions(rope="none")).layout == "microsoft"
    assert summarise(tmp_path).also == ("sdpadiff",)
    store(tmp_path, source, Shape(20, 4, 2, 4))
    with pytest.raises(InputError, match=r"--gqa-layout is missing.*--layout sdpadiff says too"):
        read_checkpoint(tmp_path, CheckpointOptions(rope="none"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("diffllama", {}, "has the keys of layout diffllama, but no config.json beside it says so"),
        ("diffllama", {"model_type": "diffllama", "num_attention_heads": 9}, "num_attention_heads in config.json is 9"),
        ("diffllama", {"model_type": "diffllama", "rope_scaling": {"type": "yarn"}}, "rope_type is 'yarn'"),
        ("diffllama", {"model_type": "diffllama", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("motif", {"model_type": "motif", "num_noise_heads": 8}, "num_noise_heads is set"),
        ("phi4flash", {"num_hidden_layers": 4}, None),
        ("phi4flash", {"num_hidden_layers": 2}, "layer 3 is a cross-attention layer"),
    ],
)
def test_fields_that_are_wrong_or_not_supported(
    name: str, fields: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    source = SOURCES[name]
    store(tmp_path, source, Shape(20, 4, 2, 4))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if message is None:
        assert read_checkpoint(tmp_path).config.sliding_window is None
        return
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.0.self_attn.wq_b_gate.weight", "Motif-3"),
        ("model.layers.0.self_attn.lambda_init", "axolotl"),
        ("layers.0.attn.da.lambda_q1", "ArchScale"),
        ("layers.0.attn.linear_qkv.weight", "Dragon"),
        ("layers.0.self_attn.q_proj.qweight", "quantised"),
        ("model.layers.0.self_attn.q_proj.weight", "no differential attention"),
    ],
)
def test_what_cannot_be_deployed_is_named(key: str, message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path)


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    source = SOURCES["microsoft-flash"]
    state = store(tmp_path, source, Shape(20, 4, 4, 4))
    key = source.prefix + "k_proj.weight"
    save_file({**state, key: state[key].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"k_proj.weight has dtype torch.float8_e4m3fn"):
        read_checkpoint(tmp_path, CheckpointOptions(rope="none"))


def test_shards_that_are_missing_or_wrong(tmp_path: Path) -> None:
    source = SOURCES["diffdeploy"]
    state = store(tmp_path, source, Shape(20, 4, 2, 4))
    (tmp_path / "model.safetensors").unlink()
    keys = list(state)
    save_file({key: state[key] for key in keys[:4]}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {key: "a.safetensors" if key in keys[:4] else "b.safetensors" for key in keys}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"lacks the shards b\.safetensors"):
        read_checkpoint(tmp_path)
    save_file({key: state[key] for key in keys[4:-1]}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=f"lacks the key {keys[-1]}"):
        read_checkpoint(tmp_path)
    save_file({key: state[key] for key in keys[4:]}, tmp_path / "b.safetensors")
    found = read_checkpoint(tmp_path)
    assert [file.name for file in found.files] == ["a.safetensors", "b.safetensors"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "../a.safetensors")}))
    with pytest.raises(InputError, match="not beside it"):
        read_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="is not an index of shards"):
        read_checkpoint(tmp_path)


def test_what_a_layout_cannot_hold(tmp_path: Path) -> None:
    store(tmp_path, SOURCES["diffllama-bias"], Shape(20, 4, 2, 4))
    found = read_checkpoint(tmp_path)
    for layout, message in (
        ("microsoft", "no place for"),
        ("motif", "needs subln.weight"),
        ("timm", "not causal"),
        ("microsoft-v2", "version 2"),
        ("other", "accepted: diffdeploy, microsoft"),
    ):
        with pytest.raises(InputError, match=message):
            write_checkpoint(found.config, found.weights, layout)
