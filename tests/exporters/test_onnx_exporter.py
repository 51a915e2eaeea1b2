"""The lowered ONNX file, run by onnxruntime and compared with the fp64 oracle; and the oracle with loop formulas."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from diffdeploy import load
from diffdeploy.bundle import open_bundle, read_weights
from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import RopeConfig
from diffdeploy.engines.triton import deploy_to_triton
from diffdeploy.exporters import ExportOptions, export, export_bundle
from diffdeploy.exporters import onnx as onnx_exporter
from diffdeploy.formats import RunOptions
from diffdeploy.formats.onnx import constants as onnx_constants
from diffdeploy.formats.onnx.names import MODEL
from diffdeploy.graphs import DType, graph_spec
from diffdeploy.modules import DiffAttention
from diffdeploy.selftest.local_artifact import LocalArtifact
from diffdeploy.verify.cases import Case, Kind
from diffdeploy.verify.oracle import oracle
from diffdeploy.verify.run import run_case
from diffdeploy.verify.yardsticks import Yardsticks
from tests import oracles
from tests.support.blocks import checkpoint_of, make_config, random_weights
from tests.support.bundles import BundleCache
from tests.support.pairwise import each_value, rest_is_slow


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_oracle_matches_loops(style: str) -> None:
    config = make_config(rope=RopeConfig(style="half" if style == "half" else "interleaved", theta=100.0))
    weights = {name: tensor.numpy() for name, tensor in random_weights(config).items()}
    x = np.random.default_rng(0).standard_normal((2, 7, 24))
    for row, sequence in zip(oracle(config, weights, {"hidden_states": x})["output"], x, strict=True):
        expected = oracles.block(
            sequence, weights, heads=4, kv_heads=2, lambda_init=config.lambda_init, causal=True, rope=(style, 100.0)
        )
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("opset", "dtype"),
    rest_is_slow([(23, "float32"), (18, "float16"), (18, "float32"), (23, "float16")], quick=2),
)
def test_sample_layer_through_onnxruntime(tmp_path: Path, opset: int, dtype: DType) -> None:
    checkpoint = read_checkpoint(SAMPLE, CheckpointOptions(layer=1))
    torch_dtype = getattr(torch, dtype)
    weights = {
        name: tensor if name.startswith("lambda") else tensor.to(torch_dtype)
        for name, tensor in checkpoint.weights.items()
    }
    block = DiffAttention.from_weights(
        checkpoint.config, weights, impl="two_call", max_positions=128, dtype=torch_dtype
    )
    spec = graph_spec("plain", checkpoint.config, dtype=dtype, max_batch_size=4, max_sequence_length=128)
    export.lower_block(block, spec, tmp_path, ExportOptions(opset=opset))
    path = tmp_path / MODEL

    model = onnx.load(path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["Attention"], counts["Softmax"]) == ((2, 0) if opset >= 23 else (0, 2))
    assert str(Path.cwd()).encode() not in path.read_bytes()

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays = {name: tensor.double().numpy() for name, tensor in weights.items()}
    generator = np.random.default_rng(opset)
    for batch, length in ((1, 1), (2, 1), (3, 65), (1, 128)):
        x = generator.standard_normal((batch, length, 128)).astype(dtype)
        (actual,) = session.run(["output"], {"hidden_states": x})
        expected = oracle(checkpoint.config, arrays, {"hidden_states": x})["output"]
        relative = np.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean())
        assert relative < 16 * np.finfo(dtype).eps


def test_weights_too_large_for_a_protobuf_go_to_a_file_beside_it(
    sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_exporter, "_MAX_INLINE_BYTES", 1000)
    done = export_bundle(
        sample, tmp_path / "out", ExportOptions(max_batch_size=2, max_sequence_length=16, cases="quick")
    )
    assert done.report is not None
    assert done.report.passed
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 50_000
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 100_000
    assert "model.onnx.data" in open_bundle(tmp_path / "out").manifest.files
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    runtime = load(moved)
    assert runtime(hidden_states=np.ones((1, 3, 128), np.float32))["output"].shape == (1, 3, 128)


def test_weights_too_large_for_one_file_go_to_several(
    sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_exporter, "_MAX_INLINE_BYTES", 1000)
    monkeypatch.setattr(onnx_exporter, "_MAX_FILE_BYTES", 100_000)
    options = ExportOptions(max_batch_size=2, max_sequence_length=16, cases="quick")
    done = export_bundle(sample, tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.name.endswith(".onnx.data"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00002.onnx.data" for n in (1, 2)]
    assert all(0 < path.stat().st_size <= 100_000 for path in files)
    bundle = open_bundle(tmp_path / "out")
    assert {path.name for path in files} < set(bundle.manifest.files)
    # Triton, and faults that save the model anew, take all of them.
    copied = deploy_to_triton(bundle, tmp_path / "triton", name="block")
    assert {path.name for path in (copied / "1").iterdir()} == {"model.onnx", *(path.name for path in files)}
    onnx_constants.write(tmp_path / "out", {}, {})
    assert not any(path.exists() for path in files)


@each_value(
    most=1, named={"23": ("standard", 23), "20": ("standard", 20), "ort": ("ort", None)}, kind=["outliers", "scales"]
)
def test_float16_scores_that_a_mask_hides_may_be_of_any_size(
    named: tuple[str, int | None], kind: Kind, bundles: BundleCache
) -> None:
    """A hidden score beyond 65504 is infinity, and must neither be seen nor make NaN of its row."""
    flavor, opset = named
    config = make_config(embed_dim=16, head_dim=16)
    options = ExportOptions(
        graph="masked", dtype="float16", onnx_flavor=flavor, opset=opset, max_batch_size=4, max_sequence_length=70
    )
    path = bundles.bundle(checkpoint_of(config), options, verify=False)
    bundle = open_bundle(path)
    exact = {name: array.astype(np.float64) for name, array in read_weights(bundle).items()}
    yardsticks = Yardsticks(bundle, exact)
    with LocalArtifact(path, RunOptions()) as artifact:
        for seed in range(3):
            case = Case(batch_size=3, sequence_length=65, seed=seed, kind=kind, mask="mixed")
            report = run_case(case, bundle, artifact, yardsticks)
            assert report.passed, report.failure
            (output,) = report.outputs
            # Where eager overflows too, nothing would be seen.
            assert output.num_unjudged < 0.8 * 3 * 65 * 16
