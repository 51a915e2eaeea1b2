"""Model repositories for Triton: what is in them, and Triton's own schema of their configuration."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.engines.triton import deploy_to_triton
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions
from diffdeploy.files import file_sha256
from tests.support.bundles import ENGINE_MODEL, BundleCache, FormatBundle
from tests.support.commands import refused
from tests.support.paths import ROOT

BLOCK = """\
name: "block"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 32
input { name: "hidden_states" data_type: TYPE_FP32 dims: [ -1, 128 ] }
output { name: "output" data_type: TYPE_FP32 dims: [ -1, 128 ] }
dynamic_batching { }
"""


def test_a_block(sample_bundle: Path, tmp_path: Path) -> None:
    model = deploy_to_triton(open_bundle(sample_bundle), tmp_path / "repository", name="block")
    assert model == tmp_path / "repository" / "block"
    assert sorted(str(path.relative_to(model)) for path in model.rglob("*")) == ["1", "1/model.onnx", "config.pbtxt"]
    assert file_sha256(model / "1/model.onnx") == file_sha256(sample_bundle / "model.onnx")
    first, _, rest = (model / "config.pbtxt").read_text().partition("\n")
    assert first.startswith("# Computed correctly by onnxruntime 1.")
    assert rest == BLOCK


def test_weights_beside_the_graph_come_along(sample_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(sample_bundle)
    (tmp_path / "bundle").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "bundle" / name).write_bytes(name.encode())
    # As an export above 2 GB has it.
    files = {**opened.manifest.files, "model.onnx.data": opened.manifest.files["model.onnx"]}
    large = Bundle(tmp_path / "bundle", opened.manifest.model_copy(update={"files": files}))
    model = deploy_to_triton(large, tmp_path, name="large")
    assert (model / "1/model.onnx.data").read_bytes() == b"model.onnx.data"


def test_machine_code_has_names_by_position_and_no_batches(format_bundle: FormatBundle, tmp_path: Path) -> None:
    model = deploy_to_triton(open_bundle(format_bundle("aoti")), tmp_path, name="compiled")
    config = (model / "config.pbtxt").read_text()
    assert 'platform: "torch_aoti"\nbackend: "pytorch"\nmax_batch_size: 0\n' in config
    assert '# hidden_states\ninput { name: "INPUT__0" data_type: TYPE_FP32 dims: [ -1, -1, ' in config
    assert '# output\noutput { name: "OUTPUT__0" ' in config
    assert "dynamic_batching" not in config
    assert "instance_group [ { kind: KIND_CPU } ]" in config
    assert (model / "1/model.pt2").is_file()


def test_a_format_without_a_backend(format_bundle: FormatBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has format pt2, for which Triton has no backend; accepted: onnx, aoti"):
        deploy_to_triton(open_bundle(format_bundle("pt2")), tmp_path / "repository", name="program")
    assert not (tmp_path / "repository").exists()


def test_the_command(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["deploy", str(sample_bundle), "--to", "triton", "-o", "models"]
    assert main(command) == 0
    assert capsys.readouterr().out == "wrote models/bundle: 1/model.onnx, config.pbtxt\n"
    assert "models/bundle is not empty; give another --output, or --force to replace a Triton" in refused(
        command, capsys
    )
    assert "name is '../lm'" in refused([*command, "--name", "../lm"], capsys)
    assert main([*command, "--name", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["1/model.onnx", "config.pbtxt"]
    assert main([*command, "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["bundle", "other"]


# Reads a configuration with the messages that NVIDIA publishes, in an environment that has them.
READ = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
print(json_format.MessageToJson(text_format.Parse(open(sys.argv[1]).read(), ModelConfig())))
"""


@pytest.mark.engines
def test_tritons_schema(sample: Checkpoint, bundles: BundleCache, format_bundle: FormatBundle, tmp_path: Path) -> None:
    cached = ExportOptions(graph="cached", dtype="float16", max_sequence_length=64, cases="quick")
    paths = {
        "cached": bundles.bundle(sample, cached),
        "model": bundles.bundle(read_model(SAMPLE), ENGINE_MODEL),
        "ort": bundles.bundle(read_model(SAMPLE), replace(ENGINE_MODEL, onnx_flavor="ort")),
        "aoti": format_bundle("aoti"),
    }
    for name, path in paths.items():
        bundle = open_bundle(path)
        config = _read_by_triton(deploy_to_triton(bundle, tmp_path, name=name) / "config.pbtxt")
        graph = bundle.manifest.graph
        batched = name != "aoti"
        assert config["name"] == name
        assert config.get("maxBatchSize", 0) == (graph.axes["batch_size"].max if batched else 0)
        assert ("dynamicBatching" in config) == batched
        for side, tensors in (("input", graph.inputs), ("output", graph.outputs)):
            assert [len(each["dims"]) + batched for each in config[side]] == [len(t.shape) for t in tensors.values()]
            if batched:
                assert [each["name"] for each in config[side]] == list(tensors)
    config = _read_by_triton(tmp_path / "cached" / "config.pbtxt")
    assert config["input"][3] == {
        "name": "past_key_values.key",
        "dataType": "TYPE_FP16",
        "dims": [str(axis) for axis in (2, -1, 32)],
    }


def _read_by_triton(config: Path) -> Any:
    python = ROOT / ".venv-engines-mlserver/bin/python"
    read = subprocess.run([python, "-c", READ, config], capture_output=True, text=True, check=True)
    return json.loads(read.stdout)
