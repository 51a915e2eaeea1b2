"""Packages of compilers that link the C++ library in another way than torch."""

import shutil
from pathlib import Path

import pytest

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main


@pytest.mark.slow  # everything is compiled afresh for another compiler
def test_a_library_that_is_linked_statically_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "static-g++"
    linking = 'case "$*" in *-shared*) set -- "$@" -static-libstdc++;; esac'
    compiler.write_text(f'#!/bin/sh\n{linking}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    output = tmp_path / "out"
    arguments = ["--layer", "0", "--format", "aoti", "--max-sequence-length", "16", "--cases", "quick"]
    assert main(["export", str(SAMPLE), *arguments, "-o", str(output)]) == 4
    assert f"{compiler} links libstdc++ statically" in capsys.readouterr().err
    assert not output.exists()
