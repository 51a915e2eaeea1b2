"""``diffdeploy verify BUNDLE --self-test`` as a user meets it."""

import json
import shutil
from pathlib import Path

import pytest

from diffdeploy.bundle import open_bundle, sign_bundle
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.exporters import ExportOptions
from diffdeploy.selftest import Fault, all_faults, trials
from diffdeploy.selftest.models import model_faults
from tests.support.bundles import SMALL_MODEL, BundleCache, FormatBundle
from tests.support.keys import key_pair

CHOSEN = ("lambda_negated", "run_nan_at_length_one", "byte_changed")


@pytest.fixture(scope="module")
def bundle(sample: Checkpoint, bundles: BundleCache) -> Path:
    return bundles.bundle(sample, ExportOptions(max_batch_size=3, max_sequence_length=16), verify=False)


@pytest.fixture(autouse=True)
def _few_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [fault for fault in all_faults() if fault.name in CHOSEN]
    monkeypatch.setattr(trials, "faults_of", lambda target: chosen)


def test_json_names_counts_and_faults(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "--self-test", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    result = said["self_test"]
    assert (said["status"], result["injected"], result["caught"], result["located"]) == ("passed", 3, 3, 1)
    by_name = {fault["name"]: fault for fault in result["faults"]}
    assert by_name.keys() == set(CHOSEN)
    assert by_name["lambda_negated"]["stage"] == by_name["lambda_negated"]["expected_stage"] == "lambda"
    assert by_name["lambda_negated"]["by"][0] == "check lambda"
    assert by_name["run_nan_at_length_one"]["by"] == ["case B1-S1-normal"]
    assert by_name["byte_changed"]["by"] == ["opening"]


def test_faults_of_models_name_the_layer(
    bundles: BundleCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("ffn_weight_scaled", "cache_stale_slot", "generation_sees_padding")
    monkeypatch.setattr(
        trials, "faults_of", lambda target: [f for f in model_faults(target.decoder) if f.name in names]
    )
    assert main(["verify", str(bundles.bundle(read_model(SAMPLE), SMALL_MODEL)), "--self-test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["self_test"]
    assert (result["injected"], result["caught"], result["with_stage"], result["located"]) == (3, 3, 1, 1)
    by_name = {fault["name"]: fault for fault in result["faults"]}
    assert by_name["ffn_weight_scaled"]["stage"] == "layer 3"
    assert by_name["generation_sees_padding"]["by"] == ["check greedy tokens"]


def test_faults_are_put_behind_the_signature(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key is for the bundle as it is: it would refuse every copy, and nothing else would be tried."""
    shutil.copytree(bundle, tmp_path / "bundle")
    keys = key_pair(tmp_path)
    sign_bundle(open_bundle(tmp_path / "bundle"), keys.private)
    command = ["verify", str(tmp_path / "bundle"), "--self-test", "--json", "--public-key"]
    assert main([*command, str(keys.public)]) == 0
    faults = json.loads(capsys.readouterr().out)["self_test"]["faults"]
    assert {fault["name"]: fault["by"][0] for fault in faults} == {
        "lambda_negated": "check lambda",
        "run_nan_at_length_one": "case B1-S1-normal",
        "byte_changed": "opening",
    }
    assert main([*command, str(key_pair(tmp_path, "other").public)]) == 5


def test_the_table_is_for_people_and_the_verdict_for_the_shell(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--self-test"]) == 0
    said = capsys.readouterr()
    assert said.out == f"3 of 3 faults caught, 1 of 1 located: {bundle}\n"
    assert "lambda_negated" in said.err
    assert "B1-S1-normal" in said.err


def test_a_fault_that_is_not_seen_exits_1(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = Fault(name="harmless", place="runtime", breaks="nothing", wrap=lambda run: run)
    monkeypatch.setattr(trials, "faults_of", lambda target: [unseen])
    assert main(["verify", str(bundle), "--self-test"]) == 1
    said = capsys.readouterr()
    assert f"error: the verification of {bundle} does not detect harmless; do not rely on it" in said.err


@pytest.mark.parametrize("option", [["--cases", "quick"], ["--golden"], ["--seed", "1"]], ids=lambda option: option[0])
def test_what_does_not_go_together_is_refused(
    option: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(bundle), "--self-test", *option]) == 2
    assert f"--self-test verifies copies with faults in them, so it cannot be combined with {option[0]}" in (
        capsys.readouterr().err
    )


def test_no_bundle_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path), "--self-test"]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_a_fault_that_the_format_cannot_hold_is_listed_with_the_reason(
    format_bundle: FormatBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GroupQueryAttention is causal, so a block that forgets to be cannot be exported with it."""
    chosen = [fault for fault in all_faults() if fault.name in ("not_causal", "byte_changed")]
    monkeypatch.setattr(trials, "faults_of", lambda target: chosen)
    assert main(["verify", str(format_bundle("onnx-ort")), "--self-test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["self_test"]
    assert [fault["name"] for fault in result["faults"]] == ["byte_changed"]
    assert [skipped["name"] for skipped in result["skipped"]] == ["not_causal"]
    assert "is causal, but this block is not" in result["skipped"][0]["reason"]
