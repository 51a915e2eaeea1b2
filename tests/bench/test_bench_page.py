"""The page of results: what its files say, and nothing else."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.benchmarks import make_report
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "benchmarks_page.py"))


def test_the_page_in_the_tree_is_what_its_files_say(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted(Path("docs/benchmarks").glob("*.json"))
    assert files
    assert Path("docs/benchmarks.md").read_text() == script["page"](Path("docs/benchmarks.md"), files)
    assert all(file.with_suffix(".svg").is_file() for file in files)


def test_there_are_sections_for_what_was_measured_only(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    cpu = make_report({"naive": 10.0, "onnx": 4.0})
    cuda = cpu.model_copy(update={"environment": cpu.environment.model_copy(update={"device": "a GPU"})})
    for name, report in (("cpu", cpu), ("cuda", cuda)):
        Path(f"{name}.json").write_text(json.dumps(report.fields()))
    both = script["page"](Path("page.md"), [Path("cpu.json"), Path("cuda.json")])
    assert both.index("## CPU") < both.index("(cpu.svg)") < both.index("## CUDA") < both.index("(cuda.svg)")
    assert "a GPU with a processor" in both
    assert "| onnx | 4.00 | 0.5% | 0.400 |" in both
    assert "CUDA" not in script["page"](Path("page.md"), [Path("cpu.json")])
