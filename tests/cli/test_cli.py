"""The command line as a user meets it: what it prints where, and its exit codes."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdeploy import load
from diffdeploy.cli.main import main
from diffdeploy.verify.oracle import oracle
from tests.support.blocks import make_config, random_weights
from tests.support.commands import COMMAND, open_bundle_without_digests, refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

GIVEN = ["--depth", "1", "--rope", "interleaved", "--rope-theta", "100", "--gqa-layout", "canonical"]
SIZES = ["--max-sequence-length", "16", "--max-batch-size", "2"]
SMALL = ["--layer", "0", *SIZES]


def weights_file(path: Path, **changes: Any) -> Path:
    weights = {name: tensor.float() for name, tensor in random_weights(make_config()).items()}
    save_file({**weights, **changes}, path)
    return path


def test_export_without_a_checkpoint_verifies_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--format", "onnx", "--json", *SMALL]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["status"] == "passed"
    assert result["format"] == "onnx"
    assert result["bundle"] == "artifacts/sample-layer0-onnx"
    assert result["graph"] == {
        "variant": "plain",
        "attention_ops": 2,
        "opset": 23,
        "inputs": ["hidden_states"],
        "outputs": ["output"],
    }
    verification = result["verification"]
    assert verification["passed"] is True
    assert verification["num_cases"] == len(verification["cases"]) > 10
    assert 0 < verification["worst"]["budget_used"] <= 1
    assert verification["worst"]["budget_used"] == max(case["budget_used"] for case in verification["cases"])
    assert "normal" in said.err
    files = {path.name for path in Path("artifacts/sample-layer0-onnx").iterdir()}
    assert files == {"manifest.json", "model.onnx", "weights.safetensors", "golden.safetensors", "verification.json"}


def test_export_of_a_bare_half_precision_block_and_its_use_from_python(tmp_path: Path) -> None:
    file = weights_file(tmp_path / "block.safetensors")
    output = tmp_path / "out"
    options = [*GIVEN, *SIZES, "--cases", "quick", "--dtype", "float16", "--opset", "18"]
    assert main(["export", str(file), *options, "-o", str(output)]) == 0
    from safetensors.numpy import load_file

    runtime = load(output, threads=1)
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float16)
    expected = oracle(runtime.bundle.manifest.block, load_file(output / "weights.safetensors"), {"hidden_states": x})[
        "output"
    ]
    np.testing.assert_allclose(runtime(hidden_states=x)["output"], expected, rtol=0, atol=0.02)


def test_two_exports_have_the_same_bytes(sample_bundle: Path, tmp_path: Path) -> None:
    """The other one is not even of the same process."""
    arguments = ["--layer", "1", "--max-sequence-length", "256", "--cases", "quick"]
    assert main(["export", *arguments, "-o", str(tmp_path / "out")]) == 0
    assert {file.name for file in sample_bundle.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    for file in sample_bundle.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_no_verify_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["export", *SMALL, "--format", "pt2", "--no-verify", "--json", "-o", str(output)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["verification"]["passed"]) == ("unverified", False)
    assert result["graph"]["attention_ops"] == 2
    assert main(["inspect", str(output)]) == 0
    assert "NOT verified" in capsys.readouterr().out


def test_verify_of_a_bundle(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sample_bundle), "--seed", "5"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"passed: {sample_bundle} (")
    assert "bit-identical" in said.err


def test_verify_of_a_wrong_artifact_exits_1(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    from diffdeploy.bundle import open_bundle, write_manifest

    model = onnx.load(bundle_copy / "model.onnx")
    next(node for node in model.graph.node if node.op_type == "Sub" and "scaled" in node.input[0]).op_type = "Add"
    onnx.save(model, bundle_copy / "model.onnx")
    write_manifest(bundle_copy, open_bundle_without_digests(bundle_copy))
    assert open_bundle(bundle_copy)
    assert main(["verify", str(bundle_copy), "--json"]) == 1
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["status"], result["verification"]["passed"]) == ("failed", False)
    first = next(line for line in said.err.splitlines() if line.startswith("error: "))
    assert first.startswith(f"error: {bundle_copy} failed verification: ")
    assert re.search(
        r"\d+ of \d+ cases failed, first B1-S1-normal: the error of output is [\d.e+]+ times the allowed one", first
    )
    assert first.endswith(
        f"diffdeploy verify {bundle_copy} --seed 0 --save-inputs inputs.safetensors saves the inputs on which it fails"
    )


def test_verify_of_a_damaged_bundle_exits_5(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (bundle_copy / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    assert "sha256 differs" in refused(["verify", str(bundle_copy)], capsys, code=5)
    assert "sha256 differs" in refused(["inspect", str(bundle_copy)], capsys, code=5)


def test_inspect(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffdeploy.checkpoints.files import SAMPLE

    assert main(["inspect", str(sample_bundle), "--json"]) == 0
    bundle = json.loads(capsys.readouterr().out)
    assert (bundle["kind"], bundle["format"], bundle["config"]["num_kv_heads"]) == ("bundle", "onnx", 2)
    assert main(["inspect", str(SAMPLE), "--json"]) == 0
    checkpoint = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in checkpoint["layers"]] == [0, 1, 2, 3]
    assert checkpoint["layers"][0]["lambda_init"] == pytest.approx(0.2)
    for path in (sample_bundle, SAMPLE):
        assert main(["inspect", str(path)]) == 0
        assert "lambda_init" in capsys.readouterr().out


def test_inspect_says_what_is_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(weights_file(tmp_path / "block.safetensors"))]) == 0
    said = capsys.readouterr().out
    assert "not recorded: give --rope" in said
    assert "not known: give --depth" in said


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == version("torch")
    assert found["formats"]["onnx"] == {"export": True, "run": True, "verify": True, "why_not": None}
    assert main(["env"]) == 0
    assert "export, run, verify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["export", "--format", "tflite"], "'tflite' is not one of"),
        (["export", "--opset", "17"], "opset is 17; accepted: 18 to 24"),
        (["export", "--layer", "9"], "its layers are: 0, 1, 2, 3"),
        (["export", "--attention-impl", "naive"], "accepted: auto, two_call, padded"),
        (["export", "--max-batch-size", "1"], "max batch size is 1; accepted: 2 or more"),
        (["export", "--seed", "-1"], "seed is -1"),
        (["export", "-o", "/proc/here"], "/proc/here cannot be written"),
        (["verify", "nowhere"], "nowhere is not a bundle"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["polish"], "No such command"),
        (["export", "--opsett", "23"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(arguments, capsys)


def test_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = weights_file(tmp_path / "good.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    pickled = tmp_path / "pickled.pt"
    pickled.write_bytes(pickle.dumps(os.getcwd))
    unknown = tmp_path / "unknown.safetensors"
    save_file({"fc.weight": torch.zeros(2, 2)}, unknown)
    lambda_q1 = torch.zeros(6)
    lambda_q1[0] = float("nan")
    cases = [
        (truncated, "may be truncated"),
        (pickled, "never executed"),
        (unknown, "no known layout"),
        (weights_file(tmp_path / "nan.safetensors", lambda_q1=lambda_q1), "lambda_q1 holds NaN"),
        (
            weights_file(tmp_path / "shape.safetensors", **{"out_proj.weight": torch.zeros(24, 47)}),
            "accepted: [24, 48]",
        ),
        (weights_file(tmp_path / "heads.safetensors", **_keys_and_values(3)), "divisor of num_heads (4)"),
    ]
    for file, message in cases:
        assert message in refused(["export", str(file), *GIVEN, "-o", "out"], capsys)
    big = weights_file(tmp_path / "big.safetensors", **{"v_proj.weight": torch.full((24, 24), 1e6)})
    assert "too large for torch.float16" in refused(["export", str(big), *GIVEN, "--dtype", "float16"], capsys)


def _keys_and_values(heads: int) -> dict[str, torch.Tensor]:
    return {f"{name}_proj.weight": torch.zeros(12 * heads, 24) for name in "kv"}


def test_odd_head_width_with_rope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(head_dim=5, rope=None)
    save_file({name: w.float() for name, w in random_weights(config).items()}, tmp_path / "odd.safetensors")
    assert "head_dim is 5" in refused(["export", str(tmp_path / "odd.safetensors"), *GIVEN], capsys)


def test_taken_output_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").mkdir()
    Path("taken/mine").write_text("precious")
    assert "not empty" in refused(["export", "-o", "taken"], capsys)
    assert "not a bundle, so --force" in refused(["export", "-o", "taken", "--force"], capsys)
    assert Path("taken/mine").read_text() == "precious"
    Path("file").write_text("precious")
    assert "is a file" in refused(["export", "-o", "file"], capsys)
    assert "cannot be written" in refused(["export", "-o", "file/inside"], capsys)


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nowhere", "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["exit_code"]) == ("failed", 2)
    assert "nowhere is not a bundle" in result["error"]


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run([*COMMAND, "verify", "nowhere", "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert "InputError" in done.stderr


def test_a_full_disk_leaves_nothing() -> None:
    limit = 100_000

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [*COMMAND, "export", *SMALL, "-o", "deep/out"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small_files_only,
        # A process that measures its coverage would need the disk itself.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith("error: no space left to write ")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupt_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen([*COMMAND, "export", "-o", "deep/out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(Path.cwd().glob("deep/.out.new-*/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert err.splitlines()[-1] == b"error: interrupted; nothing was kept"
    assert list(Path.cwd().iterdir()) == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from diffdeploy.cli.main import main; main(['export', '--help']); "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_runtime_needs_no_torch(sample_bundle: Path) -> None:
    code = (
        "import sys, numpy, diffdeploy; r = diffdeploy.load(sys.argv[1]); "
        "y = r(hidden_states=numpy.ones((1, 3, 128), numpy.float32))['output']; print(y.shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, sample_bundle], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 3, 128) False"


def test_force_replaces_a_bundle(bundle_copy: Path) -> None:
    shutil.copytree(bundle_copy, "old")
    assert main(["export", "--layer", "3", *SIZES, "--format", "pt2", "--no-verify", "-o", "old", "--force"]) == 0
    assert json.loads(Path("old/manifest.json").read_text())["provenance"]["layer"] == 3
    assert [path.name for path in Path.cwd().iterdir()] == ["old"]


@pytest.mark.slow
def test_every_layer_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    from diffdeploy.checkpoints.files import SAMPLE

    Path("out/layer2").mkdir(parents=True)
    Path("out/layer2/mine").write_text("precious")
    assert main(["export", str(SAMPLE), "--layer", "all", *SIZES, "-o", "out", "--json"]) == 2
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["status"] == "failed"
    assert [bundle["layer"] for bundle in result["bundles"]] == [0, 1, 3]
    assert all(bundle["status"] == "passed" for bundle in result["bundles"])
    assert [(failure["layer"], failure["exit_code"]) for failure in result["failures"]] == [(2, 2)]
    assert "layer 2 (3 of 4)" in said.err
    assert said.err.strip().splitlines()[-1].startswith("error: layer 2: out/layer2 is not empty")
    assert sorted(path.name for path in Path("out").iterdir()) == ["layer0", "layer1", "layer2", "layer3"]


def test_verify_against_the_checkpoint(sample_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffdeploy.checkpoints.files import SAMPLE

    assert main(["verify", str(sample_bundle), "--checkpoint", str(SAMPLE)]) == 0
    assert "the weights are those of model.safetensors, bit for bit" in capsys.readouterr().err
    from safetensors.torch import load_file

    shutil.copytree(SAMPLE, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["layers.1.self_attn.k_proj.weight"][7, 7] += 1e-6
    save_file(weights, tmp_path / "other" / "model.safetensors")
    assert main(["verify", str(sample_bundle), "--checkpoint", str(tmp_path / "other")]) == 1
    assert "origin: k_proj.weight differs" in capsys.readouterr().err


def test_inspect_of_a_model_without_differential_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert "it holds no differential attention" in refused(["inspect", str(tmp_path)], capsys)
