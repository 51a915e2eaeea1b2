"""``diffdeploy generate``, and models on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffdeploy
from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.layer_rows import by_layer, of_layers
from diffdeploy.cli.main import main
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


@pytest.fixture(scope="module")
def model(bundles: BundleCache) -> str:
    return str(bundles.bundle(read_model(SAMPLE), SMALL_MODEL))


def test_text_is_streamed_and_its_speed_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "def main(", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr()
    assert main(["generate", model, "--prompt", "def main(", "--max-new-tokens", "12", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert shown.out == result["text"] + "\n"
    assert bytes(result["input_ids"]).decode() == "def main("
    assert bytes(result["output_ids"]).decode() == result["text"]
    assert result["prefill_tokens_per_second"] > 0
    assert result["decode_tokens_per_second"] > 0
    assert "9 prompt tokens at" in shown.err
    # The same from a file, and from tokens.
    Path("prompt.txt").write_text("def main(")
    assert main(["generate", model, "--prompt-file", "prompt.txt", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == shown.out
    ids = ",".join(map(str, result["input_ids"]))
    assert main(["generate", model, "--input-ids", ids, "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, result["output_ids"])) + "\n"


def test_a_stop_is_not_shown(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "def main(", "--max-new-tokens", "30"]) == 0
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[5:9]
    assert main(["generate", model, "--prompt", "def main(", "--max-new-tokens", "30", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_more_options_reach_the_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", model, "--prompt", "x = x = x", "--max-new-tokens", "12"]
    shown = []
    for more in ([], ["--repetition-penalty", "3"], ["--temperature", "2", "--seed", "1"]):
        assert main([*arguments, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 3


@pytest.fixture(scope="module")
def chatty(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample with a chat template beside it."""
    bundle = tmp_path_factory.mktemp("chatty") / "bundle"
    shutil.copytree(model, bundle)
    (bundle / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'refuse' in m.content %}{{ raise_exception('no\\nsuch') }}{% endif %}"
        "def {{ m.role }}({% endfor %}{{ add_generation_prompt }}{{ messages[0].content }}"
    )
    write_manifest(bundle, open_bundle(model).manifest)
    return str(bundle)


def test_a_chat_template_makes_the_prompt(chatty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", chatty, "--prompt", "x, ", "--chat", "--max-new-tokens", "9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert bytes(result["input_ids"]) == b"def user(Truex, "
    message = refused(["generate", chatty, "--prompt", "refuse", "--chat"], capsys)
    assert message.endswith("raised: no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--prompt", "a"], "has no chat template"),
        (["--chat", "--input-ids", "1"], "--chat sends text as a message, but --input-ids gives tokens"),
        (["--stop", "", "--prompt", "a"], "stop contains an empty text"),
        (["--min-new-tokens", "-1", "--prompt", "a"], "min_new_tokens is -1"),
        (["--repetition-penalty", "0", "--prompt", "a"], "repetition_penalty is 0.0; accepted: a number above 0"),
        (["--prompt", "a" * 60], "the prompt has 60 tokens and 1 will follow; the bundle was exported for 48 tokens"),
        ([], "give one of --prompt, --prompt-file and --input-ids"),
        (["--prompt", "a", "--input-ids", "1"], "give one of --prompt, --prompt-file and --input-ids"),
        (["--prompt", ""], "the prompt is empty"),
        (["--input-ids", "1,x"], "--input-ids is '1,x'; accepted: comma-separated numbers"),
        (["--input-ids", "1,999"], "input_ids holds numbers from 1 to 999; accepted: 0 to 255"),
        (["--prompt", "a", "--max-new-tokens", "100"], "exported for 48"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read as text"),
    ],
)
def test_bad_prompts_get_one_sentence(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["generate", model, *arguments], capsys)


def test_a_bundle_without_a_tokenizer_takes_tokens(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    bare = "bare"
    shutil.copytree(model, bare)
    for name in ("tokenizer.json", "verification.json"):
        Path(bare, name).unlink()
    write_manifest(Path(bare), open_bundle(model).manifest.model_copy(update={"verified": False}))
    assert "has no tokenizer.json" in refused(["generate", bare, "--prompt", "a"], capsys)
    assert main(["generate", bare, "--input-ids", "97", "--max-new-tokens", "2"]) == 0
    assert "exported without verification; run diffdeploy verify" in capsys.readouterr().err


def test_options_of_blocks_and_models_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--graph is cached, which is for a block" in refused(["export", "--graph", "cached"], capsys)
    assert "--logits is for whole models" in refused(["export", "--layer", "0", "--logits", "last"], capsys)
    flash2 = ["export", "--format", "flash2", "--dtype", "float16", "--no-verify"]
    assert "format flash2 is for blocks" in refused(flash2, capsys)
    assert "--format all compares the formats of one block" in refused(["export", "--format", "all"], capsys)


def test_a_model_is_inspected_and_matched_with_its_checkpoint(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model]) == 0
    out = capsys.readouterr().out
    for said in (
        "4 layers, 256 tokens, separate head",
        "tokenizer.json; no end token",
        "0.2, 0.355509, 0.470713, 0.556058, one lambda; output scale 0.8, 0.644491",
        "past_key_values.0-3.key float32",
    ):
        assert said in out
    assert main(["verify", model, "--cases", "1", "--checkpoint", str(SAMPLE)]) == 0
    assert "bit for bit" in capsys.readouterr().err


def exported(output: str, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    """What the export of the whole sample prints."""
    sizes = ["--max-sequence-length", "48", "--max-batch-size", "4"]
    assert main(["export", "--output", output, "--json", *sizes, *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_result_of_an_export_says_how_many_layers(capsys: pytest.CaptureFixture[str]) -> None:
    result = exported("whole", capsys, "--cases", "1")
    assert (result["status"], result["format"], result["bundle"]) == ("passed", "onnx", "whole")
    graph = result["graph"]
    assert list(graph) == ["variant", "num_layers", "attention_ops", "opset", "inputs", "outputs"]
    assert (graph["variant"], graph["num_layers"], graph["attention_ops"]) == ("model", 4, 8)
    assert result["verification"]["passed"]
    assert result["verification"]["num_layers"] == 4


@pytest.mark.slow
def test_the_result_of_an_export_that_is_not_verified_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    whole, bare = exported("whole", capsys, "--cases", "1"), exported("bare", capsys, "--no-verify")
    assert bare["graph"] == whole["graph"]
    assert (bare["status"], bare["verification"]["passed"]) == ("unverified", False)
    assert main(["diff", "whole", "bare"]) == 0
    assert capsys.readouterr().out == "bundle  verified: True -> False\n"


def test_what_is_alike_in_every_layer_is_said_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with diffdeploy.load(model) as runtime:
        sizes: dict[Any, int] = {"batch_size": 1, "sequence_length": 2, "past_sequence_length": 0}
        sizes["total_sequence_length"] = 2
        inputs: dict[str, Any] = {
            name: np.zeros([sizes.get(axis, axis) for axis in tensor.shape], tensor.dtype)
            for name, tensor in runtime.spec.inputs.items()
        }
    np.savez("inputs.npz", **inputs)
    assert main(["run", model, "--input", "inputs.npz", "--output", "outputs.npz"]) == 0
    assert "present.0-3.key float32 [1, 2, 2, 32], present.0-3.value float32 [1, 2, 2, 32]" in capsys.readouterr().out


def test_layers_that_differ_are_told_apart() -> None:
    rows = [("logits", "a"), *((f"present.{n}.key", "x" if n != 2 else "y") for n in range(5)), ("present.key", "z")]
    found = [("logits", "a"), ("present.0-1,3-4.key", "x"), ("present.2.key", "y"), ("present.key", "z")]
    assert by_layer(rows) == found
    assert of_layers(["none"] * 3) == "none"
    assert of_layers(["8 keys", "none", "8 keys"]) == "8 keys in layer 0,2 | none in layer 1"


def test_a_checkpoint_says_that_it_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(SAMPLE)]) == 0
    assert "export packages the whole model, and export --layer one of its blocks" in capsys.readouterr().out
    assert main(["inspect", str(SAMPLE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole_model"] is True
