"""``diffdeploy verify --engine``, as far as it goes where no engine is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.engines.vllm import TESTED, VllmEngine
from tests.engines.test_engine_verification import lambda_of_another_layer
from tests.engines.toy_engine import ToyEngine
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "trains"], "engine is 'trains'; accepted: genai, vllm, reference, openvino"),
        (
            ["--engine", "vllm", "--cases", "quick"],
            "--engine has inputs of its own, so it cannot be combined with --cases",
        ),
        (["--engine", "vllm", "--golden"], "so it cannot be combined with --golden"),
        (["--engine", "vllm", "--save-report", "report.json"], "so it cannot be combined with --save-report"),
        (["--tensor-parallel-size", "2"], "verify without --engine has no ranks"),
        (["--engine", "reference", "--tensor-parallel-size", "2"], "verify without --engine has no ranks"),
        (["--engine", "reference", "--runtime", "openvino"], "--engine reference is a runtime itself"),
        (["--engine", "vllm", "--tensor-parallel-size", "0"], "Invalid value for '--tensor-parallel-size'"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["verify", str(SAMPLE), *arguments], capsys)


def test_the_model_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model was given" in refused(["verify", "--engine", "vllm"], capsys)


def test_an_engine_that_is_not_there_is_exit_code_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmEngine, "distributions", ("no-such-engine",))
    message = refused(["verify", str(SAMPLE), "--engine", "vllm"], capsys, 3)
    assert message == "error: vllm is not installed; pip install 'diffdeploy[vllm]'"
    # Another version of it is none that was tested.
    monkeypatch.setattr(VllmEngine, "distributions", ("torch",))
    assert f"was tested with {', '.join(TESTED)}; install" in refused(
        ["verify", str(SAMPLE), "--engine", "vllm"], capsys, 3
    )


def with_toy(monkeypatch: pytest.MonkeyPatch, engine: ToyEngine) -> None:
    monkeypatch.setattr("diffdeploy.engines.require_engine", lambda name: engine)


def test_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_toy(monkeypatch, ToyEngine(read_model(SAMPLE)))
    assert main(["verify", str(SAMPLE), "--engine", "toy"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"passed: {SAMPLE} on toy ")
    stages = [line.rpartition(": ")[0] for line in said.err.splitlines()]
    assert stages == [f"opening {SAMPLE}", "running toy", "comparing with the formula"]
    with_toy(monkeypatch, ToyEngine(read_model(SAMPLE), lambda_of_another_layer))
    assert main(["verify", str(SAMPLE), "--engine", "toy", "--json", "--junit", str(tmp_path / "x.xml")]) == 1
    assert b'<failure message="' in (tmp_path / "x.xml").read_bytes()
    said = capsys.readouterr()
    result: dict[str, Any] = json.loads(said.out)
    assert result["status"] == "failed"
    assert not result["verification"]["passed"]
    assert result["error"] in said.err
    assert "does not compute what" in said.err
    assert main(["verify", str(SAMPLE), "--engine", "toy", "--warn-only"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("warning: toy ")


def test_vllm_takes_diffllama_directories_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmEngine, "why_not", lambda self: None)
    message = refused(["verify", str(SAMPLE), "--engine", "vllm"], capsys)
    assert "has the layout diffdeploy, but vLLM runs diffllama; diffdeploy convert" in message
    assert "is not a directory" in refused(["verify", str(SAMPLE / "model.safetensors"), "--engine", "vllm"], capsys)


@pytest.mark.parametrize("option", ["--engine", "--runtime"])
def test_another_runtime_runs_the_same_sweep(
    option: str, sample_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(sample_bundle), option, "reference", "--cases", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verification"]["backend"].startswith("onnx.reference ")
    assert said["verification"]["num_cases"] == 2


def test_openvino_that_is_not_there(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["verify", str(sample_bundle), "--engine", "openvino"], capsys, 3)
    assert message == "error: openvino is not installed; pip install 'diffdeploy[openvino]'"
    message = refused(["verify", str(sample_bundle), "--engine", "openvino", "--device", "cuda"], capsys, 3)
    assert message == "error: OpenVINO bundles run on cpu, not on cuda"
