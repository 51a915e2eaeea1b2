"""What a user says about a checkpoint that its files do not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffdeploy
from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint, summarise
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions, settled_length
from diffdeploy.graphs import Variant
from tests.support.blocks import make_config, random_weights


def test_auto_is_the_layout_that_is_recognised() -> None:
    assert summarise(SAMPLE, "auto") == summarise(SAMPLE)
    named = read_checkpoint(SAMPLE, CheckpointOptions(layout="auto", layer=1))
    assert named.layout == "diffdeploy"
    assert named.options.given() == {"layer": 1}


@pytest.mark.parametrize(
    "command", [["inspect"], ["export", "--format", "pt2", "--depth", "2", "--rope", "none"]], ids=lambda c: c[0]
)
def test_auto_is_accepted_by_every_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(
        {name: tensor.float() for name, tensor in random_weights(make_config(num_kv_heads=4)).items()}, "b.safetensors"
    )
    assert main([*command, "b.safetensors", "--layout", "auto", "--layout", "auto"]) == 0
    assert "microsoft" in capsys.readouterr().out or command[0] == "export"


def test_the_top_of_the_package_reads_a_layer_and_writes_it_back() -> None:
    found = diffdeploy.read_checkpoint(SAMPLE, layer=3)
    same = diffdeploy.read_checkpoint(SAMPLE, diffdeploy.CheckpointOptions(layer=3))
    assert (found.layer, found.keys, found.config) == (3, same.keys, same.config)
    written = diffdeploy.write_checkpoint(found.config, found.weights, found.layout, prefix="layers.3.self_attn.")
    with safe_open(SAMPLE / "model.safetensors", framework="pt") as stored:
        assert all(torch.equal(tensor, stored.get_tensor(name)) for name, tensor in written.items())
    with pytest.raises(InputError, match="layer is 3, but 1 in the options"):
        diffdeploy.read_checkpoint(SAMPLE, CheckpointOptions(layer=1), layer=3)


def with_positions(folder: Path, positions: object) -> Checkpoint:
    """A block beside a config.json that says for how many positions its model was made."""
    config = make_config(num_kv_heads=4)
    save_file({name: tensor.float() for name, tensor in random_weights(config).items()}, folder / "b.safetensors")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    return read_checkpoint(folder / "b.safetensors", CheckpointOptions(depth=2, rope="none"))


def test_the_longest_sequence_is_what_the_model_was_made_for(tmp_path: Path) -> None:
    found = with_positions(tmp_path, 96)
    assert settled_length(ExportOptions(), found) == (96, None)
    assert settled_length(ExportOptions(max_sequence_length=33), found) == (33, None)
    assert settled_length(ExportOptions(), replace(found, max_positions=None)) == (2048, None)


@pytest.mark.parametrize(("graph", "taken"), [("plain", 2048), ("cached", 2**25 // 24)])
def test_what_a_verification_cannot_reach_is_not_declared(graph: Variant, taken: int, tmp_path: Path) -> None:
    found = with_positions(tmp_path, 10**7)
    length, reason = settled_length(ExportOptions(graph=graph), found)
    assert (length, found.config.embed_dim) == (taken, 24)
    assert reason is not None
    assert "max_position_embeddings is 10000000" in reason
    assert str(taken) in reason


@pytest.mark.parametrize("positions", [0, -1, "many", 1.5])
def test_a_number_of_positions_that_is_none_is_refused(positions: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_position_embeddings in config\.json is"):
        with_positions(tmp_path, positions)


def test_an_export_takes_it_and_says_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with_positions(tmp_path, 96)
    arguments = ["export", "b.safetensors", "--depth", "2", "--rope", "none", "--format", "pt2", "--no-verify",
                 "--force", "-o", "out"]  # fmt: skip
    assert main(arguments) == 0
    assert open_bundle("out").manifest.graph.axes["sequence_length"].max == 96
    with_positions(tmp_path, 10**7)
    assert main(arguments) == 0
    assert open_bundle("out").manifest.graph.axes["sequence_length"].max == 2048
    assert "the longest sequence is 2048" in " ".join(capsys.readouterr().err.split())
