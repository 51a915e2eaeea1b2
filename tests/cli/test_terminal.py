"""What files say is shown, and never obeyed by the terminal: control characters in any name or value are escaped."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli import console
from diffdeploy.cli.main import main
from diffdeploy.cli.report_tables import print_report
from diffdeploy.verify import read_report
from tests.support.manifests import fields_of, reached, set_to, signed

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

# Clears the screen; sets the title; begins the line again; turns the text around; and is no markup of tables.
EVIL = "\x1b[2J\x1b]0;title\x07\r\u202e\x9b1m[red]"
SHOWN = r"\x1b[2J\x1b]0;title\x07"


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    odd = {letter for letter in out + err if not letter.isprintable() and letter != "\n"}
    assert not odd
    return out + err


@pytest.mark.parametrize(
    "path",
    [("provenance", "files"), ("environment", "packages"), ("files",)],
    ids=".".join,
)
def test_names_in_a_manifest(path: tuple[str, ...], bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = reached(fields_of(bundle_copy), path)
    set_to(bundle_copy, path, {**node, EVIL: next(iter(node.values()))})
    assert SHOWN in said(["inspect", str(bundle_copy)], capsys, 5 if path == ("files",) else 0)


@pytest.mark.parametrize("name", ["python", "machine", "diffdeploy"])
def test_values_in_a_manifest(
    name: str, sample_bundle: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_to(bundle_copy, ("environment", name), EVIL)
    assert SHOWN in said(["diff", str(sample_bundle), str(bundle_copy)], capsys, 0)


def test_a_value_of_two_lines(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_to(bundle_copy, ("provenance", "layout"), "\x1b[2Jmicrosoft\nverified")
    assert "\\x1b[2Jmicrosoft verified" in said(["inspect", str(bundle_copy)], capsys, 0)


def test_a_format_of_no_version(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_to(bundle_copy, ("format",), EVIL)
    for command in ("verify", "bench"):
        assert "title" in said([command, str(bundle_copy)], capsys, 3)


def test_text_of_a_contract(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(bundle_copy / "model.onnx")
    model.producer_name = EVIL
    onnx.save(model, bundle_copy / "model.onnx")
    signed(bundle_copy)
    assert "title" in said(["verify", str(bundle_copy), "--cases", "1"], capsys, 1)


def test_names_of_cases_of_a_user(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = np.zeros((1, 2, 128), np.float32)
    inputs: dict[str, Any] = {f"{EVIL}.hidden_states": states}
    np.savez(tmp_path / "x.npz", **inputs)
    assert SHOWN in said(["verify", str(sample_bundle), "--load-inputs", str(tmp_path / "x.npz")], capsys, 0)


def test_keys_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {key.replace("layers", EVIL): tensor for key, tensor in load_file(SAMPLE / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((SAMPLE / "config.json").read_text()), "x": EVIL}))
    assert SHOWN in said(["inspect", str(tmp_path)], capsys, 0)


def test_a_line_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_text("a\nb\x1bc größer")
    console.note("a\tb")
    assert capsys.readouterr() == ("a b\\x1bc größer\n", "a\\tb\n")


def test_a_text_of_a_model_keeps_its_lines_and_letters(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_part("def f():\r\n\treturn '\x1b[2J\x9b'\u3000👩\u200d🚀\n")
    assert capsys.readouterr().out == "def f():\\r\n\treturn '\\x1b[2J\\x9b'\u3000👩\u200d🚀\n"


def test_tables_at_80_columns_break_no_word(sample_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = read_report(sample_bundle / "verification.json")
    shown = []
    for width in (80, 200):
        file = io.StringIO()
        terminal = Console(width=width, force_terminal=True, color_system=None, file=file, highlight=False)
        monkeypatch.setattr(console, "standard_error", lambda terminal=terminal: terminal)
        print_report(report)
        text = file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        shown.append(text)
    # Names of cases may be broken between their parts.
    words = [re.split(r"\s+|(?<=[-_])", text.replace("─", "")) for text in shown]
    narrow, wide = map(set, words)
    assert narrow <= wide
    assert "eager" in shown[1]


@pytest.mark.parametrize(("width", "shown"), [(80, 6), (200, 12)])
def test_figures_that_do_not_fit_are_left_out_whole(
    width: int, shown: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.StringIO()
    terminal = Console(width=width, force_terminal=True, color_system=None, file=file, highlight=False)
    monkeypatch.setattr(console, "_standard_output", lambda: terminal)
    headings = ["candidate", *(f"of column{number}" for number in range(11))]
    console.print_figures("sizes", headings, [["stacked_split", *(["12345.678"] * 11)]])
    assert file.getvalue().count("12345.678") == shown - 1
    left_out = "" if shown == 12 else f"shown in a wider terminal: {', '.join(headings[shown:])}\n"
    assert capsys.readouterr().out == f"sizes\n{left_out}"


def test_a_terminal_breaks_values_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("name", "word " * 20), ("x", "a/path/that/is/longer-than/the/width")]
    console.print_rows(rows)
    assert capsys.readouterr().out.splitlines()[0] == "name  " + "word " * 19 + "word"
    terminal = Console(width=30, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(console, "_standard_output", lambda: terminal)
    console.print_rows(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["name  word word word word word", *["      word word word word word"] * 3]
    assert lines[-1] == "x     a/path/that/is/longer-than/the/width"
