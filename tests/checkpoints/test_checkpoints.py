"""Reading Microsoft V1 checkpoints, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import DiffAttentionConfig, lambda_init_at
from diffdeploy.errors import InputError
from tests.support.blocks import make_config, random_weights

GIVEN = CheckpointOptions(depth=2, rope="half", rope_theta=500.0, gqa_layout="canonical")


def bare_weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(make_config()).items()}


def test_sample_has_learned_and_reads() -> None:
    training = json.loads((SAMPLE / "config.json").read_text())["training"]
    assert training["held_out_bits_per_byte"] < 0.5 * training["held_out_order0_entropy_bits_per_byte"]
    assert (SAMPLE / "model.safetensors").stat().st_size < 4_000_000
    checkpoint = read_checkpoint(SAMPLE, CheckpointOptions(layer=3))
    assert (checkpoint.config.num_heads, checkpoint.config.num_kv_heads, checkpoint.config.head_dim) == (4, 2, 16)
    assert isinstance(checkpoint.config, DiffAttentionConfig)
    assert checkpoint.config.lambda_init == lambda_init_at(3)
    assert all(key.startswith("layers.3.self_attn.") for key in checkpoint.keys)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bare_state_dict(tmp_path: Path, suffix: str) -> None:
    weights, path = bare_weights(), tmp_path / f"block{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"model": weights}, path)
    checkpoint = read_checkpoint(path, GIVEN)
    assert isinstance(checkpoint.config, DiffAttentionConfig)
    assert checkpoint.config.lambda_init == lambda_init_at(2)
    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(checkpoint.weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("depth", "--depth is missing: lambda_init depends"),
        ("rope", "--rope interleaved.half.half-reversed.none is missing"),
        ("rope_theta", "--rope-theta is missing"),
        ("gqa_layout", "--gqa-layout is missing"),
    ],
)
def test_what_cannot_be_inferred_is_asked_for(tmp_path: Path, field: str, message: str) -> None:
    save_file(bare_weights(), tmp_path / "block.safetensors")
    options = CheckpointOptions(**{**GIVEN.__dict__, field: None})
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "block.safetensors", options)


def test_several_layers_ask_for_a_choice() -> None:
    with pytest.raises(InputError, match="choose one with --layer: 0, 1, 2, 3"):
        read_checkpoint(SAMPLE)
    with pytest.raises(InputError, match=r"layer 9 is not in .*its layers are: 0, 1, 2, 3"):
        read_checkpoint(SAMPLE, CheckpointOptions(layer=9))


def _missing_key(weights: dict[str, Any]) -> None:
    del weights["lambda_k2"]


def _nan(weights: dict[str, Any]) -> None:
    weights["q_proj.weight"][3, 4] = float("nan")


def _wrong_shape(weights: dict[str, Any]) -> None:
    weights["out_proj.weight"] = weights["out_proj.weight"][:, :-1].contiguous()


def _odd_rows(weights: dict[str, Any]) -> None:
    weights["k_proj.weight"] = weights["k_proj.weight"][:-1].contiguous()


def _indivisible(weights: dict[str, Any]) -> None:
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = torch.zeros(36, 24)


def _unknown(weights: dict[str, Any]) -> None:
    for name in list(weights):
        weights["x_" + name] = weights.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_key, "lacks the keys lambda_k2"),
        (_nan, "q_proj.weight holds NaN"),
        (_wrong_shape, r"out_proj.weight has shape \[24, 47\]; accepted: \[24, 48\]"),
        (_odd_rows, "k_proj.weight has 23 rows; accepted: a multiple of 12"),
        (_indivisible, "num_kv_heads is 3"),
        (_unknown, "no known layout"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    weights = bare_weights()
    damage(weights)
    save_file(weights, tmp_path / "block.safetensors")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "block.safetensors", GIVEN)


def test_truncated_safetensors_is_refused(tmp_path: Path) -> None:
    data = (SAMPLE / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path / "cut.safetensors", GIVEN)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed-by-unpickling"),))


def test_pickles_are_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Payload()}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Payload()))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(InputError, match="pickled objects are never executed"):
            read_checkpoint(tmp_path / name, GIVEN)
    assert not (tmp_path / "executed-by-unpickling").exists()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing.safetensors")
