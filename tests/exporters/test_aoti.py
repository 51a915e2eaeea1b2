"""Packages of compilers that link the C++ library in another way than torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from diffdeploy.checkpoints.files import SAMPLE
from tests.support.commands import COMMAND


@pytest.mark.slow  # everything is compiled afresh for another compiler
def test_a_library_that_is_linked_statically_is_refused(tmp_path: Path) -> None:
    compiler = tmp_path / "static-g++"
    linking = 'case "$*" in *-shared*) set -- "$@" -static-libstdc++;; esac'
    compiler.write_text(f'#!/bin/sh\n{linking}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    output = tmp_path / "out"
    arguments = ["--layer", "0", "--format", "aoti", "--max-sequence-length", "16", "--cases", "quick"]
    # In a process of its own: inductor takes the compiler from the environment when it is imported.
    done = subprocess.run(
        [*COMMAND, "export", str(SAMPLE), *arguments, "-o", str(output)],
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert f"{compiler} links libstdc++ statically" in done.stderr
    assert not output.exists()
