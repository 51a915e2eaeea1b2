"""An installation for running ONNX bundles has no torch: what needs it says so, and the rest works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# As if torch were not installed: neither importable nor found.
HIDE_TORCH = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Hide())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("torch", "onnx", "onnxscript") else found(name)
"""


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", HIDE_TORCH + code, *arguments], capture_output=True, text=True, check=False
    )


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run("from diffdeploy.cli.main import run\nsys.argv[0] = 'diffdeploy'\nrun()", *arguments)


def test_an_onnx_bundle_is_loaded_and_called(sample_bundle: Path) -> None:
    code = (
        "import numpy as np, diffdeploy\n"
        "with diffdeploy.load(sys.argv[1]) as runtime:\n"
        "    print(runtime(hidden_states=np.ones((1, 3, 128), np.float32))['output'].shape)\n"
        "assert 'torch' not in sys.modules"
    )
    done = run(code, str(sample_bundle))
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 3, 128)"), done.stderr


def test_golden_vectors_are_verified(sample_bundle: Path) -> None:
    done = command("verify", str(sample_bundle), "--golden")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("golden vectors match: ")


def test_env_says_what_is_missing() -> None:
    done = command("env", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["threads"] is None
    rows = {(row["format"], row["device"], row["dtype"]): row for row in said["matrix"]}
    assert rows["onnx", "cpu", "float32"]["run"]
    assert not rows["onnx", "cpu", "float32"]["export"]
    assert rows["pt2", "cpu", "float32"]["why_not"] is not None
    assert "which is not installed" in rows["pt2", "cpu", "float32"]["why_not"]


@pytest.mark.parametrize("arguments", [["export"], ["bench"]], ids=lambda arguments: arguments[0])
def test_what_needs_torch_exits_3_and_names_the_extra(arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1] == "error: torch is not installed; pip install 'diffdeploy[export]'"
