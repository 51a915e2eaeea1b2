"""A format is added by one module and one row: here the row is an entry point, as another package would have it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import diffdeploy
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError
from diffdeploy.formats.registry import export_targets, formats
from diffdeploy.formats.rows import rows
from diffdeploy.selftest import all_faults

MODULE = Path(__file__).parent / "toy_format.py"


def install(folder: Path, entry_point: str) -> None:
    """What an installed package leaves behind: its module, and its entry point."""
    shutil.copy(MODULE, folder / "toy_format.py")
    metadata = folder / "toy_format-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[diffdeploy.formats]\ntoy = {entry_point}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))  # for the processes that verify and measure
    caches = (rows, formats, all_faults)
    for cached in caches:
        cached.cache_clear()
    yield folder
    for cached in caches:
        cached.cache_clear()


def test_a_format_of_one_module_is_exported_verified_self_tested_and_measured(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(installed, "toy_format:ToyFormat")
    assert list(export_targets())[-1] == "toy"
    bundle = tmp_path / "bundle"
    small = ["--max-sequence-length", "16", "--max-batch-size", "3", "--cases", "quick"]
    assert main(["export", "--format", "toy", "--layer", "0", "-o", str(bundle), *small]) == 0
    with diffdeploy.load(bundle) as runtime:
        assert runtime.description.startswith("toy")
        assert runtime(hidden_states=np.ones((1, 3, 128), np.float32))["output"].shape == (1, 3, 128)
    assert main(["verify", str(bundle), "--cases", "quick"]) == 0
    capsys.readouterr()
    assert main(["verify", str(bundle), "--self-test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["self_test"]
    assert result["caught"] == result["injected"] >= 25
    assert {fault["place"] for fault in result["faults"]} == {"bundle", "runtime", "block"}
    assert main(["bench", str(bundle), "--impl", "naive", "--seq", "8", "--rounds", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {row["name"]: row["status"] for row in rows} == {"naive": "measured", "bundle": "measured"}
    assert main(["bench", "--format", "toy", "--impl", "none", "--seq", "8", "--rounds", "2", "--embed-dim", "32",
                 "--num-heads", "2", "--json"]) == 0  # fmt: skip
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["results"]] == ["toy"]
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"]["toy"]["export"]


@pytest.mark.parametrize("entry_point", ["toy_format:_FILE", "diffdeploy.formats.pt2:Pt2Format"])
def test_an_entry_point_that_is_no_new_format_is_refused(installed: Path, entry_point: str) -> None:
    install(installed, entry_point)
    with pytest.raises(InputError, match=r"the entry point toy of group diffdeploy\.formats is"):
        formats()
