"""``verify`` and ``diff`` as a user meets them: parts of a verification, files of inputs and reports, bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.cli.main import main
from diffdeploy.exporters import ExportOptions
from diffdeploy.verify import verify_bundle
from tests.support.bundles import BundleCache
from tests.support.manifests import accept, signed, with_report


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    """Run, see the exit code; give what went to standard output and to standard error."""
    assert main(arguments) == code
    said = capsys.readouterr()
    return said.out, said.err


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    out, _ = said_by([*arguments, "--json"], capsys, code)
    fields: dict[str, Any] = json.loads(out)
    return fields


@pytest.fixture
def wrong_bundle(bundle_copy: Path) -> Path:
    """With new digests after the sign of lambda was turned, so that only verification can tell."""
    import onnx

    manifest = open_bundle(bundle_copy).manifest
    model = onnx.load(bundle_copy / "model.onnx")
    next(node for node in model.graph.node if node.op_type == "Sub" and "scaled" in node.input[0]).op_type = "Add"
    onnx.save(model, bundle_copy / "model.onnx")
    write_manifest(bundle_copy, manifest)
    return bundle_copy


def test_quick_and_a_number(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = json_of(["verify", str(sample_bundle), "--cases", "quick"], capsys)["verification"]
    assert (quick["selection"], quick["passed"]) == ("quick", True)
    assert 5 < quick["num_cases"] < 15
    three = json_of(["verify", str(sample_bundle), "--cases", "3", "--seed", "9"], capsys)["verification"]
    assert (three["selection"], three["num_cases"], three["seed"]) == ("3", 3, 9)


def test_a_report_has_all_that_judging_needs(sample_bundle: Path) -> None:
    report = json.loads((sample_bundle / "verification.json").read_text())
    assert report["budget"] == {"k": 12.0, "rmse_floor": 4.0, "max_floor": 8.0}
    assert set(report["files"]) == {"model.onnx", "weights.safetensors", "golden.safetensors"}
    for case in report["cases"]:
        for output in case["outputs"]:
            assert all(output[name] is not None for name in output if name != "reason"), output
    names = {check["name"] for check in report["contract"]}
    assert {"determinism", "batch invariance", "causality"} <= names


def test_inputs_are_saved_and_loaded(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "inputs.npz"
    said_by(["verify", str(sample_bundle), "--cases", "3", "--save-inputs", str(file)], capsys)
    with np.load(file) as stored:
        assert len(stored.files) == 3
        np.savez(tmp_path / "mine.npz", hidden_states=stored[stored.files[1]])
    loaded = json_of(["verify", str(sample_bundle), "--load-inputs", str(file)], capsys)["verification"]
    assert loaded["selection"] == "user"
    assert [case["id"] for case in loaded["cases"]] == [f"user-{name.partition('.')[0]}" for name in stored.files]
    both = ["verify", str(sample_bundle), "--load-inputs", str(tmp_path / "mine.npz"), "--cases", "2"]
    mine = json_of(both, capsys)["verification"]
    assert mine["selection"] == "user and 2"
    assert [case["id"] for case in mine["cases"]] == ["user-B2-S7", "B1-S1-normal", "B2-S7-normal"]


def test_users_inputs_may_hold_nan(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 128), dtype=np.float32)
    x[1, 3, 0] = np.nan
    np.savez(tmp_path / "x.npz", hidden_states=x)
    assert (
        json_of(["verify", str(sample_bundle), "--load-inputs", str(tmp_path / "x.npz")], capsys)["status"] == "passed"
    )


def test_golden_needs_neither_torch_nor_onnx(sample_bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript'): sys.modules[name] = None\n"
        "from diffdeploy.cli.main import main\n"
        "sys.exit(main(['verify', sys.argv[1], '--golden', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code, sample_bundle], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert (fields["status"], fields["verification"]["selection"]) == ("passed", "golden")
    assert [case["id"] for case in fields["verification"]["cases"]] == ["B1-S1-normal", "B2-S7-normal"]


def test_golden_judges_as_the_whole_sweep_does(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = json_of(["verify", str(sample_bundle), "--golden"], capsys)["verification"]["cases"]
    swept = {case["id"]: case for case in json.loads((sample_bundle / "verification.json").read_text())["cases"]}
    for case in golden:
        assert case == swept[case["id"]]


def test_golden_fails_on_a_wrong_artifact(wrong_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accept(wrong_bundle)
    out, err = said_by(["verify", str(wrong_bundle), "--golden"], capsys, code=1)
    assert out == ""
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    assert "2 of 2 cases failed" in error
    assert error.endswith(f"run diffdeploy verify {wrong_bundle} for the whole sweep")


def test_golden_of_a_bundle_that_was_never_verified(
    sample: Checkpoint, bundles: BundleCache, capsys: pytest.CaptureFixture[str]
) -> None:
    # The bundle of the self-test's command, which is not verified either.
    options = ExportOptions(max_batch_size=3, max_sequence_length=16)
    bundle = bundles.bundle(sample, options, verify=False)
    _, err = said_by(["verify", str(bundle), "--golden"], capsys, code=2)
    assert "was exported without verification" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(cases=[]), "did not accept the bundle"),
        (
            lambda report: report.update(cases=[case for case in report["cases"] if case["id"] != "B2-S7-normal"]),
            "lacks B2-S7-normal",
        ),
        (lambda report: report["cases"][0].update(outputs=[]), "lacks B1-S1-normal"),
        (lambda report: report["cases"][0]["outputs"][0].update(output="other"), "lacks B1-S1-normal"),
        (lambda report: report["contract"][0].update(passed=False), "did not accept the bundle"),
        (lambda report: report["files"].pop("model.onnx"), "belongs to another bundle"),
        (lambda report: report["files"].update({"model.onnx": "0" * 64}), "belongs to another bundle"),
        (lambda report: report.update(dtype="bfloat16"), "belongs to another bundle"),
        (lambda report: report.update(format="pt2"), "belongs to another bundle"),
    ],
    ids=[
        "no cases",
        "a case less",
        "no outputs",
        "other output",
        "failed",
        "file",
        "digest",
        "dtype",
        "format",
    ],
)
def test_golden_of_a_report_that_cannot_be_judged_by(
    change: Callable[[dict[str, Any]], object],
    message: str,
    bundle_copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_report(bundle_copy, change)
    out, err = said_by(["verify", str(bundle_copy), "--golden"], capsys, code=5)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert f"verification.json in {bundle_copy} {message}" in err


def test_golden_of_stored_vectors_that_lack_one(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = load_file(bundle_copy / "golden.safetensors")
    del stored["B2-S7-normal.hidden_states"]
    save_file(stored, bundle_copy / "golden.safetensors")
    accept(signed(bundle_copy))
    _, err = said_by(["verify", str(bundle_copy), "--golden"], capsys, code=5)
    assert err.splitlines() == [
        f"error: golden.safetensors in {bundle_copy} lacks B2-S7-normal.hidden_states; run diffdeploy verify without "
        "--golden"
    ]


def test_the_verdict_on_golden_vectors_says_what_was_tried(
    sample_bundle: Path, wrong_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said_by(["verify", str(sample_bundle), "--golden"], capsys)
    assert out.startswith(f"golden vectors match: {sample_bundle} (2 cases; ")
    accept(wrong_bundle)
    out, _ = said_by(["verify", str(wrong_bundle), "--golden", "--warn-only"], capsys)
    assert out.startswith(f"golden vectors differ: {wrong_bundle} (2 cases; ")
    out, _ = said_by(["verify", str(sample_bundle), "--cases", "1"], capsys)
    assert out.startswith(f"passed: {sample_bundle} (1 cases; ")


def test_golden_of_every_variant(sample: Checkpoint, bundles: BundleCache, capsys: pytest.CaptureFixture[str]) -> None:
    options = ExportOptions(graph="cached", max_batch_size=2, max_sequence_length=5, cases="quick")
    bundle = bundles.bundle(sample, options)
    golden = json_of(["verify", str(bundle), "--golden"], capsys)["verification"]
    assert [case["id"] for case in golden["cases"]][2:] == ["B2-S5-left-normal", "B2-P4-S1-left-normal"]
    assert [output["output"] for output in golden["cases"][0]["outputs"]] == ["output", "present.key", "present.value"]


def test_a_report_is_judged_again(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = sample_bundle / "verification.json"
    again = json_of(["verify", "--from-report", str(stored)], capsys)
    assert again["verification"]["cases"] == json.loads(stored.read_text())["cases"]
    needed = max(case["smallest_k"] for case in again["verification"]["cases"])
    assert 0 < needed < 8
    loose = json_of(["verify", "--from-report", str(stored), "--k", str(1.01 * needed)], capsys)
    assert loose["status"] == "passed"
    tight = [str(sample_bundle), "--from-report", str(stored), "--k", str(0.99 * needed)]
    failed = json_of(["verify", *tight, "--save-report", str(tmp_path / "tight.json")], capsys, code=1)
    assert failed["status"] == "failed"
    assert sum(not case["passed"] for case in failed["verification"]["cases"]) >= 1
    assert said_by(["verify", "--from-report", str(tmp_path / "tight.json")], capsys, code=1)[0] == ""


def test_warn_only_says_what_failed_and_exits_0(wrong_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(wrong_bundle), "--cases", "2", "--warn-only"]
    out, err = said_by(arguments, capsys)
    assert f"\nwarning: {wrong_bundle} failed verification: " in err
    assert out.startswith("failed: ")
    fields = json_of(arguments, capsys)
    assert (fields["status"], fields["verification"]["passed"]) == ("failed", False)
    assert "2 of 2 cases failed" in fields["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "few"], "--cases is 'few'; accepted: quick, full or a number above 0"),
        (["--k", "2"], "cannot be combined with --k"),
        (["--golden", "--seed", "1"], "cannot be combined with --seed"),
        (["--load-inputs", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--load-inputs", "REPORT"], "accepted: .safetensors or .npz"),
        (["--save-inputs", "nowhere/x.npz"], "there is no folder nowhere"),
        (["--save-report", "nowhere/x.json"], "there is no folder nowhere"),
        (["--from-report", "nowhere.json"], "nowhere.json cannot be read"),
        (["--from-report", "REPORT", "--cases", "quick"], "runs nothing, so it cannot be combined with --cases"),
        (["--from-report", "MANIFEST"], "manifest.json is not a report of this version"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(arguments: list[str], message: str, sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"REPORT": "verification.json", "MANIFEST": "manifest.json"}
    given = [str(sample_bundle / files[text]) if text in files else text for text in arguments]
    out, err = said_by(["verify", str(sample_bundle), *given], capsys, code=2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


def test_no_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no bundle was given" in said_by(["verify"], capsys, code=2)[1]


def test_the_report_of_another_bundle(
    sample_bundle: Path, wrong_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(wrong_bundle), "--from-report", str(sample_bundle / "verification.json")]
    assert "is not the report of" in said_by(arguments, capsys, code=2)[1]


@pytest.mark.parametrize("name", ["weights.safetensors", "golden.safetensors", "model.onnx"])
@pytest.mark.parametrize("golden", [[], ["--golden"]], ids=["whole", "golden"])
def test_a_file_is_missing(name: str, golden: list[str], bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle_copy / name).unlink()
    _, err = said_by(["verify", str(bundle_copy), *golden], capsys, code=5)
    assert err == f"error: {bundle_copy} lacks {name}; copy the bundle again\n"


def test_diff_of_two_bundles(
    sample: Checkpoint, sample_bundle: Path, bundles: BundleCache, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bundles.bundle(sample, ExportOptions(max_sequence_length=200, opset=18, graph="masked", cases="quick"))
    changes = json_of(["diff", str(sample_bundle), str(other)], capsys)["changes"]
    found = {(change["section"], change["name"]): (change["before"], change["after"]) for change in changes}
    assert found["options", "opset"] == (23, 18)
    assert found["graph", "axes.sequence_length.max"] == (256, 200)
    assert ("files", "weights.safetensors") not in found
    assert ("versions", "packages.torch") not in found
    assert found["checks", "padding invariance"] == (None, "passed")
    assert any(section == "figures" for section, _ in found)
    out, _ = said_by(["diff", str(sample_bundle), str(other)], capsys)
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["options", "opset: 23 -> 18"] in lines
    assert "inputs.attention_mask is only in B: int64, [batch_size, sequence_length], 0 to 1" in out
    # As long as what differs, and not as the sweep.
    assert len(lines) < 25


def test_diff_of_reports_shows_what_moved(
    sample_bundle: Path, wrong_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "right.json").write_bytes(verify_bundle(sample_bundle, cases=2).to_bytes())
    (tmp_path / "wrong.json").write_bytes(verify_bundle(wrong_bundle, cases=1).to_bytes())
    out, _ = said_by(["diff", str(tmp_path / "right.json"), str(tmp_path / "wrong.json")], capsys)
    assert "changed: model.onnx" in out
    assert "passed: True -> False" in out
    assert "budget used   B1-S1-normal output: " in out
    assert "1 only in A" in out
    assert said_by(["diff", str(sample_bundle), str(tmp_path / "right.json")], capsys)[0]


def test_diff_of_the_same(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json_of(["diff", str(sample_bundle), str(sample_bundle)], capsys)["same"] is True
    out, _ = said_by(["diff", str(sample_bundle), str(sample_bundle)], capsys)
    assert out == f"{sample_bundle} and {sample_bundle} do not differ\n"


def test_diff_of_what_is_neither(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path / "nowhere", "cannot be read"), (tmp_path, "is not a bundle")):
        _, err = said_by(["diff", str(sample_bundle), str(path)], capsys, code=2)
        assert message in err
