"""``diffdeploy convert``."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from tests.checkpoints.test_whole_models import motif
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


def test_the_sample_becomes_a_checkpoint_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--to", "diffllama", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["status"] == "passed"
    assert result["target"] == "diffllama"
    assert result["output"] == "artifacts/sample-diffllama"
    assert result["files"] == [
        "config.json",
        "conversion.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert result["dtype"] == "float32"
    assert result["verification"]["passed"]
    assert result["verification"]["num_cases"] == len(result["verification"]["cases"]) == 3
    assert 0 < result["verification"]["worst"]["budget_used"] < 1
    assert "max_position_embeddings in artifacts/sample-diffllama/config.json is the default" in said.err
    # What was written is a whole model to every other command.
    assert main(["convert", "artifacts/sample-diffllama", "-o", "again"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("passed: again (3 cases; worst ")
    assert [line.partition(":")[0] for line in said.err.splitlines()] == [
        "reading the checkpoint",
        "writing",
        "comparing logits",
    ]
    first, second = (load_file(Path(name) / "model.safetensors") for name in ("artifacts/sample-diffllama", "again"))
    assert all(bool((first[key] == second[key]).all()) for key in first)


def test_only_a_conversion_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "-o", "out"]) == 0
    capsys.readouterr()
    assert "--force to replace a conversion" in refused(["convert", "-o", "out"], capsys)
    assert main(["convert", "-o", "out", "--force"]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out"]
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("precious")
    assert "not a conversion, so --force" in refused(["convert", "-o", "mine", "--force"], capsys)
    # Least of all the checkpoint itself.
    weights = load_file(SAMPLE / "model.safetensors")
    Path("source").mkdir()
    save_file(weights, "source/model.safetensors")
    Path("source/config.json").write_bytes((SAMPLE / "config.json").read_bytes())
    assert "not a conversion" in refused(["convert", "source", "-o", "source", "--force"], capsys)


def test_what_cannot_be_held_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Path("motif").mkdir()
    motif(Path("motif"))
    message = refused(["convert", "motif"], capsys)
    assert message == (
        "error: DiffLlama cannot represent this model: layer 0 has lambda_init -0.00991528, but DiffLlama has the "
        "paper's value, 0.2"
    )
    assert "does not exist" in refused(["convert", "nowhere"], capsys)
    assert "'gguf'" in refused(["convert", "--to", "gguf"], capsys)


def test_a_block_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {key: tensor for key, tensor in load_file(SAMPLE / "model.safetensors").items() if "self_attn" in key}
    save_file(blocks, "blocks.safetensors")
    assert "has no token embedding" in refused(["convert", "blocks.safetensors"], capsys)
