"""Config files, keys, dtypes and shards that are wrong or not supported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffdeploy.checkpoints import (
    CheckpointOptions,
    read_checkpoint,
)
from diffdeploy.errors import InputError
from tests.source_oracles import Shape
from tests.support.code_bases import SOURCES, store


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("diffllama", {}, "has the keys of layout diffllama, but no config.json next to it says so"),
        ("diffllama", {"model_type": "diffllama", "num_attention_heads": 9}, "num_attention_heads in config.json is 9"),
        ("diffllama", {"model_type": "diffllama", "rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
        ("diffllama", {"model_type": "diffllama", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("motif", {"model_type": "motif", "num_noise_heads": 8}, "without num_attention_heads"),
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
    with pytest.raises(InputError, match="not in the same folder"):
        read_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="is not an index of shards"):
        read_checkpoint(tmp_path)
