"""What is installed: one top-level name, every package, and a sample that works from there."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run(["tar", "-cf", folder / "source.tar", *tracked.split()], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", folder / "source.tar"], cwd=source, check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_one_top_level_name_and_every_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"diffdeploy"}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert "diffdeploy/checkpoints/sample/model.safetensors" in names
    assert "diffdeploy/py.typed" in names
    assert len(names) == len(set(names))


def test_the_command_line_works_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import diffdeploy.cli.main as m; print(m.__file__); raise SystemExit(m.main())"
    arguments = ["export", "--layer", "0", "--max-sequence-length", "16", "-o", "out"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": "site"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, verdict = done.stdout.splitlines()
    assert str(tmp_path / "site") in where
    assert verdict.startswith("passed: out (")
