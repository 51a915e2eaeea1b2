"""Names of the Hugging Face hub: looked up in the local cache, never fetched."""

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from diffdeploy.checkpoints import holds_model, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from tests.support.commands import refused


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample as the hub's client keeps it, and no network."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123456789"
    shutil.copytree(SAMPLE, tmp_path / "blobs")
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_a_name_is_the_directory_in_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert holds_model("org/tiny")
    found = read_model("org/tiny")
    assert found.config == read_model(SAMPLE).config
    assert [path.name for path in found.companions] == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert main(["inspect", "org/tiny"]) == 0
    assert "layout diffdeploy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["org/other", "org/tiny..x"])
def test_what_is_not_there_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["export", name], capsys)
    assert f"{name} does not exist here, and the local cache of the Hugging Face hub does not have it" in said


def test_paths_are_no_names(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("tiny", "a/b/tiny", "org/tiny.safetensors", "../tiny", "/tiny"):
        assert f"{path} does not exist; give a .safetensors" in refused(["inspect", path], capsys)
    shutil.copytree(SAMPLE, "org/tiny")
    (Path("org/tiny") / "model.safetensors").unlink()
    assert "org/tiny must hold one .safetensors" in refused(["inspect", "org/tiny"], capsys)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'diffdeploy[hf]'" in refused(["inspect", "org/tiny"], capsys)
