"""The measurement of runtime versions: how its page is made, and that the page in the tree agrees with the tables."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.bundle import Manifest, open_bundle
from diffdeploy.formats import require_format
from diffdeploy.graphs import graph_spec
from diffdeploy.versions import release
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "runtime-versions.md"


SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / "runtime_versions_page.py"))


def row(script: dict[str, Any], dtype: str, kinds: str, *, least: str = "1.0", used: float = 3.0) -> Any:
    """Verdicts of versions 1.0, 1.1 ..., by letters; a number that is off is off by ``used``."""
    verdicts = {
        "o": script["Verdict"]("ok", 0.5),
        "w": script["Verdict"]("off", used, "wrong"),
        "n": script["Verdict"]("off", float("inf"), "NaN"),
        "r": script["Verdict"]("refuses", float("inf"), "too old"),
    }
    found = {f"1.{minor}": verdicts[kind] for minor, kind in enumerate(kinds)}
    return script["Row"]("opset 18", "plain", "grouped", [dtype], found, least)


def test_a_row_is_right_from_where_no_later_version_is_wrong(script: dict[str, Any]) -> None:
    assert row(script, "float32", "oworoo").right_from == "1.4"
    assert row(script, "float32", "oo").right_from == "1.0"
    assert row(script, "float32", "oow").right_from == "none"


def test_versions_that_are_wrong_and_admitted_are_named(script: dict[str, Any]) -> None:
    assert row(script, "float32", "rwono", least="1.2").admitted == ["1.3"]
    assert row(script, "float32", "rwooo", least="1.2").admitted == []
    assert row(script, "float32", "rwooo", least="1.0").admitted == ["1.0", "1.1"]


def test_rows_are_merged_over_dtypes_and_columns_over_versions(script: dict[str, Any]) -> None:
    alike = [row(script, "float32", "rrwwo", used=123456.0), row(script, "float16", "rrwwo")]
    (line,) = script["table"](alike)[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["opset 18", "plain", "grouped", "float32, float16"]
    assert cells[4:] == ["refuses", "off by 120,000", "ok", "1.4", "1.0"]
    titles = script["table"](alike)[0].split(" | ")
    assert titles[4:7] == ["1.0 to 1.1", "1.2 to 1.3", "1.4"]


def test_a_dtype_that_is_treated_otherwise_has_a_row_of_its_own(script: dict[str, Any]) -> None:
    lines = script["table"]([row(script, "float32", "wo"), row(script, "float16", "no")])
    assert len(lines) == 3  # both are off, and the worst of them is shown
    assert "off: no number" in lines[2]
    lines = script["table"]([row(script, "float32", "wo"), row(script, "float16", "oo")])
    assert [line.split(" | ")[3] for line in lines[2:]] == ["float32", "float16"]


def measured(heading: str) -> list[dict[str, str]]:
    """The rows of a table of the page."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return [dict(zip(titles, line, strict=True)) for line in lines]


@pytest.mark.parametrize(("package", "subjects"), [("onnxruntime", "onnx_subjects"), ("torch", "torch_subjects")])
def test_the_page_agrees_with_the_tables(
    package: str, subjects: str, sample_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as for whoever runs it
    script = runpy.run_path(str(SCRIPTS / "measure_runtime_versions.py"))
    rows = measured(package)
    sample = open_bundle(sample_bundle).manifest
    for subject in script[subjects]():
        config, options = script["BLOCKS"][subject.block], subject.options
        (found,) = (
            row
            for row in rows
            if (row["export"], row["graph"], row["block"]) == (subject.export, options.graph, subject.block)
            and options.dtype in row["dtype"].split(", ")
        )
        spec = graph_spec(options.graph, config, dtype=options.dtype, max_batch_size=4, max_sequence_length=16)
        recorded = sample.options.model_copy(update={"opset": options.opset, "flavor": options.onnx_flavor})
        changes = {"format": options.format, "config": config, "graph": spec, "options": recorded}
        manifest: Manifest = sample.model_copy(update=changes)
        assert require_format(options.format).least_versions(manifest) == {package: found["least"]}
        assert release(found["least"]) >= release(found["correct from"])
