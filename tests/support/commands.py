"""Helpers that run commands, and that read manifests without checking digests."""

import sys
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.cli.main import main

# The command line in a process of its own.
COMMAND = [sys.executable, "-m", "diffdeploy"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Check that a command exits with ``code``, prints one sentence and leaves no files; return the sentence."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    # On a busy machine, lines of progress may precede the error.
    lines = [line for line in said.err.strip().splitlines() if not line.startswith("still ")]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


def open_bundle_without_digests(bundle: Path) -> Any:
    from diffdeploy.bundle import Manifest

    return Manifest.from_bytes((bundle / "manifest.json").read_bytes())
