"""Quantised weights on the command line: what is said, what is refused, and what ends with 1."""

import json
from pathlib import Path

import pytest

from diffdeploy.cli.main import main
from tests.checkpoints.test_whole_models import diffllama
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

EXPORT = ["export", "--onnx-flavor", "ort", "--max-sequence-length", "48", "--max-batch-size", "4"]


@pytest.mark.slow
def test_the_loss_is_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.py").write_text("def main() -> None:\n    print('some text')\n" * 9)
    options = ["--weights", "int4", "--block-size", "16", "--quantize-head", "--text", "text.py", "--cases", "2"]
    assert main([*EXPORT, *options, "--max-kl", "5", "-o", "bundle", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    loss = result["loss"]
    assert result["verification"]["passed"]
    assert "loss" not in result["verification"]
    assert (loss["text"], loss["num_bytes"], loss["num_tokens"]) == ("text.py", 9 * 43, 9 * 43 - 1)
    assert loss["worst_layer"] in loss["layers"]
    assert set(loss["layers"]) == {"layer0", "layer1", "layer2", "layer3", "head"}
    assert f"loss from quantised weights: {loss['bits_per_byte']:.4g} bits per byte" in shown.err
    assert json.loads(Path("bundle/verification.json").read_text())["loss"]["kl"] == loss["kl"]

    assert main(["inspect", "bundle"]) == 0
    rows = capsys.readouterr().out
    assert "int4 in blocks of 16, accuracy level 0: projections and MLPs, and the head; all else float32" in rows
    assert f"{loss['bits_per_byte']:.4g} bits per byte" in rows
    assert "quantisation" not in rows
    assert main(["inspect", "bundle", "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)["options"]["quantisation"]
    assert recorded == {"weights": "int4", "block_size": 16, "head": True, "accuracy_level": 0}

    assert main(["generate", "bundle", "--prompt", "def main(", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_activations_in_int8_are_said_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    diffllama(Path("one layer"), num_hidden_layers=1)  # without a tokenizer, so that no loss is measured
    options = ["one layer", "--weights", "int4", "--activations", "int8", "--no-verify"]
    assert main([*EXPORT, *options, "-o", "bundle"]) == 0
    capsys.readouterr()
    assert main(["inspect", "bundle"]) == 0
    rows = capsys.readouterr().out
    assert "int4 in blocks of 32, accuracy level 4: projections and MLPs" in rows
    assert "int8 in blocks of 32, as inputs of these matrices" in rows
    assert main(["inspect", "bundle", "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)["options"]["quantisation"]
    assert recorded == {"weights": "int4", "block_size": 32, "head": False, "accuracy_level": 4}


@pytest.mark.slow  # the loss on 10,000 tokens, twice
def test_a_bundle_that_is_not_verified_says_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXPORT, "--weights", "int8", "--no-verify", "-o", "bundle"]) == 0
    assert "loss from quantised weights" in capsys.readouterr().err
    assert main([*EXPORT, "--weights", "int8", "--no-verify", "-o", "bundle", "--force", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "unverified"
    assert result["loss"]["text"] == "filecmp.py"


@pytest.mark.slow  # the loss on 10,000 tokens; tests/exporters/test_quantised_models.py has the gate on a few
def test_a_limit_is_a_gate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*EXPORT, "--weights", "int4", "-o", "bundle", "--quiet"]
    assert "KL is" in refused([*arguments, "--max-kl", "1e-6"], capsys, code=1)
    assert "the top token is the same" in refused([*arguments, "--min-agreement", "1"], capsys, code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "1", "--onnx-flavor", "ort", "--weights", "int4"], "--weights is for whole models"),
        (["--layer", "1", "--format", "all", "--weights", "int4"], "--weights is for whole models"),
        (["--weights", "int4"], "give --onnx-flavor ort"),
        (["--format", "aoti", "--weights", "int8"], "which format aoti does not have"),
        (["--onnx-flavor", "ort", "--weights", "int3"], "'int3' is not one of"),
        (["--onnx-flavor", "ort", "--weights", "int4", "--block-size", "48"], "block size is 48; accepted: 16, 32"),
        (["--onnx-flavor", "ort", "--quantize-head"], "give --weights int8 or int4"),
        (["--activations", "int8"], "--activations cannot be used without quantised weights; give --weights"),
        (["--onnx-flavor", "ort", "--weights", "int4", "--activations", "int4"], "'int4' is not one of"),
    ],
    ids=[
        *("block", "all formats", "standard", "aoti", "int3", "block size", "head alone", "activations alone"),
        "int4 activations",
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["export", *arguments], capsys)
