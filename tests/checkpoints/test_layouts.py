"""Every layout: detected, read to the function of its source, and written back bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdeploy.checkpoints import (
    CheckpointOptions,
    read_checkpoint,
    summarise,
    write_checkpoint,
)
from diffdeploy.config import DiffAttentionConfig, GqaLayout, RopeConfig, RopeStyle, lambda_init_at
from diffdeploy.errors import InputError
from tests import oracles
from tests.source_oracles import Shape
from tests.support.code_bases import LAYER, SOURCES, random_state, run_block, store

RATIOS = [(4, 4), (4, 2), (4, 1), (6, 2), (3, 1)]


LENGTH = 6


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


def test_gqa_layout_is_asked_for_only_where_it_matters(tmp_path: Path) -> None:
    source = SOURCES["microsoft-flash"]
    store(tmp_path, source, Shape(20, 4, 4, 4))
    assert read_checkpoint(tmp_path, CheckpointOptions(rope="none")).layout == "microsoft"
    assert summarise(tmp_path).also == ("sdpadiff", "blagpt")
    store(tmp_path, source, Shape(20, 4, 2, 4))
    with pytest.raises(InputError, match=r"--gqa-layout is missing.*--layout sdpadiff implies"):
        read_checkpoint(tmp_path, CheckpointOptions(rope="none"))


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
