"""Commands that concern every format: export of all, run from files, and what this machine can do."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from diffdeploy.cli.main import main
from diffdeploy.files import read_arrays, write_arrays
from tests.support.bundles import CPU_FORMATS, FormatBundle
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def states(**changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    x = np.random.default_rng(0).standard_normal((2, 5, 128), dtype=np.float32)
    return {"hidden_states": x, **changes}


@pytest.mark.slow
@without_gpu
@pytest.mark.xdist_group("program")
def test_all_formats_of_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes are those of the shared bundles, so that inductor finds in its cache what the same worker compiled."""
    sizes = ["--layer", "1", "--max-sequence-length", "70", "--max-batch-size", "4", "--cases", "quick"]
    assert main(["export", "--format", "all", *sizes, "-o", "out", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["status"] == "passed"
    formats = {row["name"]: row for row in result["formats"]}
    assert list(formats) == [*CPU_FORMATS, "flash2"]
    assert formats.pop("flash2")["status"] == "left_out"
    assert "flash2: format flash2 has no float32 kernels" in said.err
    for name, row in formats.items():
        assert row["status"] == "passed", row
        assert Path(row["bundle"], "manifest.json").is_file()
        assert row["verification"]["worst"]["budget_used"] <= 1
        assert row["size_bytes"] > 100_000
        assert row["startup"]["load_seconds"] > 0
        assert [each["sequence_length"] for each in row["latencies"]] == [70], name
        assert all(each["status"] == "measured" for each in row["latencies"])
    assert result["eager"]["latencies"][0]["ratio"] == 1.0


@without_gpu
def test_what_cannot_be_made_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    flash2 = ["--layer", "0", "--format", "flash2"]
    assert main(["export", *flash2, "--no-verify", "--dtype", "bfloat16", "-o", "out"]) == 0
    said = capsys.readouterr()
    assert said.out == "unverified: out; run diffdeploy verify out before using it\n"
    assert json.loads(Path("out/manifest.json").read_text())["verified"] is False
    assert "needs a GPU that torch" in refused(["verify", "out"], capsys, code=3)
    message = refused(["export", *flash2, "--dtype", "float16", "-o", "other"], capsys, code=3)
    assert "--no-verify exports without running it" in message
    assert "compiles for the GPU of this machine" in refused(
        ["export", "--format", "aoti", "--device", "cuda"], capsys, code=3
    )
    assert "onnxruntime has no bfloat16 attention" in refused(["export", "--dtype", "bfloat16"], capsys, code=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "flash2"], "no float32 kernels; accepted: float16 or bfloat16"),
        (["--format", "flash2", "--dtype", "float16", "--device", "cpu"], "made for cuda, not for cpu"),
        (["--format", "pt2", "--onnx-flavor", "ort"], "onnx flavor is ort, which format pt2 does not have"),
        (["--format", "aoti", "--runtime", "reference"], "runs only ONNX, but the format is aoti"),
        (["--onnx-flavor", "ort", "--graph", "cached"], "graph is cached"),
        (["--onnx-flavor", "ort", "--runtime", "reference"], "supports only standard operators"),
        (["--format", "all", "--layer", "all"], "name one layer or one format"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    layer = [] if "--layer" in arguments else ["--layer", "0"]
    assert message in refused(["export", *layer, *arguments], capsys)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_run_from_a_file_to_a_file(
    suffix: str, format_bundle: FormatBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    write_arrays(Path(f"x.{suffix}"), states())
    outputs = []
    for name in ("onnx", "pt2"):
        target = f"{name}.{suffix}"
        assert main(["run", str(format_bundle(name)), "--input", f"x.{suffix}", "--output", target, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["outputs"] == {"output": {"dtype": "float32", "shape": [2, 5, 128]}}
        outputs.append(read_arrays(Path(target))["output"])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_run_refuses_what_it_cannot_read_or_write(
    format_bundle: FormatBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(format_bundle("onnx"))
    write_arrays(Path("x.npz"), states())
    write_arrays(Path("named.npz"), {"x": states()["hidden_states"]})
    Path("broken.npz").write_bytes(Path("x.npz").read_bytes()[:100])
    Path("taken.npz").write_text("precious")
    for inputs, output, message in (
        ("nowhere.npz", "y.npz", "nowhere.npz does not exist"),
        ("broken.npz", "y.npz", "broken.npz cannot be read as .npz; it may be truncated"),
        ("named.npz", "y.npz", "inputs are ['x']; accepted: ['hidden_states']"),
        ("x.npz", "y.txt", "y.txt ends in '.txt'; accepted: .safetensors or .npz"),
        ("x.npz", "no/y.npz", "there is no folder no"),
        ("x.npz", "taken.npz", "taken.npz exists; give another file, or --force to replace it"),
    ):
        assert message in refused(["run", bundle, "-i", inputs, "-o", output], capsys)
    assert Path("taken.npz").read_text() == "precious"
    assert main(["run", bundle, "-i", "x.npz", "-o", "taken.npz", "--force"]) == 0
    assert "output" in read_arrays(Path("taken.npz"))


@without_gpu
def test_env_shows_every_format_device_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["format"], row["device"], row["dtype"]): row for row in found["matrix"]}
    assert len(rows) == 5 * 2 * 3
    assert rows["onnx", "cpu", "float32"]["run"] is True
    reference = rows["onnx", "cpu", "bfloat16"]
    multiplies = Version(version("onnx")) >= Version("1.23")
    assert (reference["export"], reference["run"], reference["verify"]) == (True, False, multiplies)
    assert rows["aoti", "cpu", "bfloat16"]["why_not"] is None
    assert "needs a GPU" in rows["pt2", "cuda", "float32"]["why_not"]
    assert found["formats"]["flash2"]["run"] is False
    assert main(["env"]) == 0
    assert "export, run, verify" in capsys.readouterr().out
