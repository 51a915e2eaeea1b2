"""Files that are damaged, or made to do harm: one sentence and exit code 2, never a loop and never "unexpected"."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError
from tests.support.blocks import make_config, random_weights

CONFIG = make_config(num_kv_heads=4)
PLAIN = CheckpointOptions(rope="none", depth=1)


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(CONFIG).items()}


def itself(path: Path) -> None:
    state: dict[str, Any] = {}
    state["model"] = state
    torch.save(state, path)


def deep(path: Path) -> None:
    state: dict[str, Any] = {"model": weights()}
    for _ in range(50):
        state = {"state_dict": state}
    torch.save(state, path)


TORCH_FILES: dict[str, Callable[[Path], Any]] = {
    "contains-itself": itself,
    "empty-pickle": lambda path: path.write_bytes(b"\x80\x02."),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "sparse": lambda path: torch.save({**weights(), "q_proj.weight": weights()["q_proj.weight"].to_sparse()}, path),
    "meta": lambda path: torch.save({**weights(), "q_proj.weight": weights()["q_proj.weight"].to("meta")}, path),
    "integers": lambda path: torch.save({**weights(), "lambda_q1": torch.ones(6, dtype=torch.int64)}, path),
    "a-list": lambda path: torch.save([1, 2], path),
    "no-tensors": lambda path: torch.save({"step": 3}, path),
    "numbers-for-names": lambda path: torch.save({1: torch.ones(2)}, path),
    "a-wrapper-that-is-a-tensor": lambda path: torch.save({"model": torch.ones(2)}, path),
}


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_torch_file_that_cannot_be_read_is_bad_input(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt"
    TORCH_FILES[name](path)
    for command in (["inspect"], ["export", "--depth", "1", "--rope", "none", "-o", str(tmp_path / "out")]):
        code = main([*command, str(path)])
        assert code == 2 or (command == ["inspect"] and name == "integers" and code == 0)
        assert "unexpected" not in capsys.readouterr().err


def test_weights_are_found_behind_any_number_of_wrappers(tmp_path: Path) -> None:
    deep(tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt", PLAIN).config.embed_dim == CONFIG.embed_dim


def sharded(folder: Path) -> Path:
    """A checkpoint of transformers before safetensors, in two shards."""
    state, index = weights(), folder / "pytorch_model.bin.index.json"
    names = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
    for shard in set(names.values()):
        torch.save({name: state[name] for name in names if names[name] == shard}, folder / shard)
    index.write_text(json.dumps({"weight_map": names}))
    return index


def test_shards_of_torch_are_read(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for path in (tmp_path, index):
        found = read_checkpoint(path, PLAIN)
        assert {file.name for file in found.files} == {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
        for name, tensor in weights().items():
            assert torch.equal(found.weights[name], tensor), name


@pytest.mark.parametrize(
    "weight_map",
    [{"q_proj.weight": "x" * 5000}, {"q_proj.weight": 3}, {"q_proj.weight": "a\0b"}, {"q_proj.weight": ""}, [], {}, 1,
     {"q_proj.weight": "/etc/hostname"}, {"q_proj.weight": "sub/a.safetensors"}, {"q_proj.weight": "."}],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_index_that_names_no_files_is_bad_input(weight_map: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError) as refused:
        read_checkpoint(tmp_path)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "", "[1]", "nul", "\ud800"], ids=lambda t: t[:6] or "empty"
)
def test_a_config_that_is_no_json_object_is_bad_input(text: str, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError, match=r"config\.json"):
        read_checkpoint(tmp_path, PLAIN)


def test_nan_in_lambda_is_shown_as_unknown_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights()
    state["lambda_q1"][0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["lambda_value"] is None
    with pytest.raises(InputError, match="lambda_q1 holds NaN"):
        read_checkpoint(tmp_path, PLAIN)
