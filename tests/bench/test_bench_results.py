"""Reports and tables: as JSON, as CSV, and as rows for people."""

import csv
import io
import json
from pathlib import Path

import pytest

from diffdeploy.bench import Row
from diffdeploy.bench.results import read_report
from diffdeploy.bench.table import HEADINGS, describe_size, figures
from diffdeploy.errors import InputError
from tests.support.benchmarks import make_report


def test_a_report_comes_back_from_its_json(tmp_path: Path) -> None:
    report = make_report({"naive": 10.0, "onnx": 4.0})
    file = tmp_path / "run.json"
    file.write_text(json.dumps(report.fields()))
    assert read_report(file) == report
    first, second = json.loads(file.read_text())["results"][:2]
    assert first["impl"] == "naive"
    assert "format" not in first
    assert second["format"] == "onnx"
    assert "impl" not in second
    file.write_text('{"results": [1]}')
    with pytest.raises(InputError, match="is not a result of diffdeploy bench"):
        read_report(file)


def test_csv_has_a_line_per_row_with_the_environment() -> None:
    lines = list(csv.DictReader(io.StringIO(make_report({"naive": 10.0, "onnx": 4.0}).to_csv())))
    assert [(line["name"], line["sequence_length"]) for line in lines] == [
        *(("naive", "128"), ("onnx", "128"), ("naive", "512"), ("onnx", "512"))
    ]
    assert lines[1]["latency_ms"] == "4.0"
    assert (lines[0]["cpu"], lines[0]["torch"], lines[0]["load_average"]) == ("a processor", "2", "0.1")


def test_figures_of_a_row() -> None:
    row = make_report({"naive": 10.0}).results[0]
    assert figures(row) == ["naive", "10.0", "0.5%", "1.000", "0.990-1.010", "100", "50%", "3.0", "2.0"]
    bare = Row(
        name="x",
        impl="x",
        format=None,
        batch_size=1,
        sequence_length=1,
        past_sequence_length=0,
        status="wrong",
        block_gflop=1.0,
        attention_gflop=1.0,
    )
    assert figures(bare)[:3] == ["x", "wrong", ""]
    assert len(figures(bare)) == len(HEADINGS)


def test_a_heading_says_what_was_timed_as_a_graph() -> None:
    report = make_report({"naive": 10.0, "onnx": 4.0})
    assert "graphs" not in describe_size(report, report.sizes[0])
    rows = [row.model_copy(update={"captured": row.name == "naive"}) for row in report.results]
    captured = report.model_copy(update={"results": rows})
    assert describe_size(captured, report.sizes[0]).endswith("; timed as CUDA graphs, except onnx")


def test_the_fastest_comes_first_and_what_was_not_timed_last() -> None:
    report = make_report({"naive": 10.0, "onnx": 4.0, "padded": 5.0})
    untimed = [
        row.model_copy(update={"latency_ms": None, "status": "wrong"}) if row.name == "onnx" else row
        for row in report.results
    ]
    rows = report.model_copy(update={"results": untimed}).rows_of(report.sizes[0])
    assert [row.name for row in rows] == ["padded", "naive", "onnx"]
