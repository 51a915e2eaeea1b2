"""Running commands and reading manifests as they are."""

from pathlib import Path
from typing import Any

import pytest

from diffdeploy.cli.main import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run, see the exit code, that one sentence was said and that nothing was left; give the sentence."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    # A machine that is busy may take long to find out.
    lines = [line for line in said.err.strip().splitlines() if not line.startswith("still ")]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


def open_bundle_without_digests(bundle: Path) -> Any:
    from diffdeploy.bundle import Manifest

    return Manifest.from_bytes((bundle / "manifest.json").read_bytes())
