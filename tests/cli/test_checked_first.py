"""Paths and options are checked before the work starts, which may take minutes.

What the work would read first is not there either, and must not be what the sentence is about.
"""

from pathlib import Path

import pytest

from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "missing.pt", "--layer", "0", "-o", "taken"], "taken is not empty"),
        (["export", "missing.pt", "--layer", "0", "-o", "file/inside"], "file is a file"),
        (["export", "missing.pt", "--weights", "int4", "--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["convert", "missing.pt", "-o", "taken"], "taken is not empty"),
        (["generate", "missing", "--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["generate", "missing", "--input-ids", "1,x"], "--input-ids is '1,x'"),
        (["verify", "missing", "--save-report", "nowhere/x.json"], "there is no folder nowhere"),
        (["verify", "missing", "--html", "taken"], "taken is a folder"),
        (["verify", "missing", "--self-test", "--junit", "nowhere/x.xml"], "there is no folder nowhere"),
        (["verify", "missing", "--cases", "some"], "--cases is 'some'"),
        (["bench", "missing.pt", "--csv", "nowhere/x.csv"], "there is no folder nowhere"),
        (["run", "missing", "-i", "x.npz", "-o", "nowhere/y.npz"], "there is no folder nowhere"),
        (["inspect", "BUNDLE", "--draw", "nowhere/y.svg"], "there is no folder nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_path_is_checked_first(
    arguments: list[str], message: str, sample_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/mine").write_text("precious")
    Path("file").write_text("precious")
    given = [str(sample_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    assert message in refused(given, capsys)


def test_a_checkpoint_is_read_before_the_sweep(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a sweep there would be a line that says how long it took."""
    message = refused(["verify", str(sample_bundle), "--checkpoint", "missing.safetensors"], capsys)
    assert "missing.safetensors does not exist" in message
