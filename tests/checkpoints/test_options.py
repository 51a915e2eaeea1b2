"""What a user says about a checkpoint that its files do not."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint, summarise
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from tests.support.blocks import make_config, random_weights


def test_auto_is_the_layout_that_is_recognised() -> None:
    assert summarise(SAMPLE, "auto") == summarise(SAMPLE)
    named = read_checkpoint(SAMPLE, CheckpointOptions(layout="auto", layer=1))
    assert named.layout == "diffdeploy"
    assert named.options.given() == {"layer": 1}


@pytest.mark.parametrize("command", [["inspect"], ["export", "--depth", "2", "--rope", "none"]], ids=lambda c: c[0])
def test_auto_is_accepted_by_every_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(
        {name: tensor.float() for name, tensor in random_weights(make_config(num_kv_heads=4)).items()}, "b.safetensors"
    )
    assert main([*command, "b.safetensors", "--layout", "auto", "--layout", "auto"]) == 0
    assert "microsoft" in capsys.readouterr().out or command[0] == "export"
