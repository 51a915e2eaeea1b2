"""On CUDA: every format exported, verified in its own process, and run on tensors that stay on the device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy import load
from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import DiffAttentionConfig, RopeConfig
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.formats import RunOptions
from diffdeploy.graphs import DType, Variant
from diffdeploy.verify.oracle import oracle
from tests.support.blocks import checkpoint_of

pytestmark = pytest.mark.gpu

CONFIG = DiffAttentionConfig(
    embed_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    lambda_init=0.3,
    output_scale=0.7,
    rope=RopeConfig(style="interleaved", theta=10_000.0),
)
CASES: list[tuple[str, Variant, DType]] = [
    ("pt2", "plain", "float32"),
    ("pt2", "cached", "bfloat16"),
    ("aoti", "plain", "float32"),
    ("aoti", "plain", "bfloat16"),
    ("aoti", "masked", "float16"),
    ("aoti", "cached", "bfloat16"),
    ("compile", "plain", "float32"),
    ("compile", "masked", "float16"),
    ("compile", "cached", "bfloat16"),
    ("flash2", "plain", "float16"),
    ("flash2", "plain", "bfloat16"),
    ("flash2", "masked", "bfloat16"),
    ("flash2", "cached", "float16"),
    ("onnx", "plain", "float32"),
    ("onnx", "masked", "float16"),
    ("onnx", "cached", "float32"),
    ("onnx", "plain", "bfloat16"),
    ("onnx-ort", "plain", "float16"),
]


@pytest.fixture(scope="module")
def block() -> Checkpoint:
    return checkpoint_of(CONFIG)


@pytest.mark.parametrize(("name", "graph", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_a_bundle_is_verified_and_stays_on_the_device(
    name: str, graph: Variant, dtype: DType, block: Checkpoint, tmp_path: Path
) -> None:
    options = ExportOptions(
        format=name.removesuffix("-ort"),
        onnx_flavor="ort" if name.endswith("-ort") else None,
        graph=graph,
        dtype=dtype,
        device="cuda",
        max_batch_size=4,
        max_sequence_length=300,
    )
    done = export_bundle(block, tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed
    assert "CUDA" in done.report.backend
    if options.format in ("aoti", "compile") and torch.cuda.get_device_capability()[0] == 9:
        takes_fused = dtype != "float32"
        assert (open_bundle(done.path).manifest.options.attention_impl == "fused") == takes_fused
    if graph != "plain":
        return
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    weights = {key: tensor.double().numpy() for key, tensor in block.weights.items()}
    expected = oracle(CONFIG, weights, {"hidden_states": x.double().numpy()})["output"]
    with load(tmp_path / "out", device="cuda:0") as runtime:
        output = runtime(hidden_states=x.cuda())["output"]
        at_home = runtime(hidden_states=x)["output"]
    assert output.is_cuda
    assert not at_home.is_cuda
    error = np.abs(output.double().cpu().numpy() - expected).max()
    assert error < 64 * torch.finfo(x.dtype).eps * np.abs(expected).max()


@pytest.mark.triton
@pytest.mark.parametrize("name", ["aoti", "compile"])
def test_values_too_wide_for_both_streams_at_once(name: str, tmp_path: Path) -> None:
    """The kernel loads them by tensor maps, for which a package allocates memory."""
    options = ExportOptions(
        format=name, graph="cached", dtype="bfloat16", device="cuda", impl="fused", max_sequence_length=600
    )
    config = replace(CONFIG, head_dim=128, gqa_layout="legacy")
    done = export_bundle(checkpoint_of(config), tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "fused runs in float16 and bfloat16"),
        ({"format": "pt2"}, "'fused' is not available in format pt2"),
    ],
)
def test_fused_where_it_cannot_be(changes: dict[str, Any], message: str, block: Checkpoint, tmp_path: Path) -> None:
    options = ExportOptions(format="aoti", dtype="float16", device="cuda", impl="fused", max_sequence_length=64)
    with pytest.raises(InputError, match=message):
        export_bundle(block, tmp_path / "out", replace(options, **changes))


def test_onnx_says_where_its_nodes_run(block: Checkpoint, tmp_path: Path) -> None:
    from diffdeploy.formats.onnx.backend import OnnxCudaBackend

    options = ExportOptions(device="cuda", max_batch_size=4, max_sequence_length=300)
    bundle = open_bundle(export_bundle(block, tmp_path / "out", options).path)
    placement = OnnxCudaBackend(bundle, RunOptions(), "cuda").placement
    assert placement["CUDAExecutionProvider"] > placement.get("CPUExecutionProvider", 0)


def test_onnxruntime_decodes_in_place_on_the_device(tmp_path: Path) -> None:
    options = ExportOptions(
        graph="model", onnx_flavor="ort", dtype="float16", device="cuda", max_batch_size=4, max_sequence_length=48
    )
    done = export_bundle(read_model(SAMPLE), tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    with load(done.path, device="cuda") as runtime, load(done.path, device="cpu") as at_home:
        assert runtime.buffers(3, 12) is not None
        found, expected = (model.generate(ids, max_new_tokens=20, eos_token_id=None) for model in (runtime, at_home))
    assert torch.equal(found, expected)
    assert "nodes on CUDA" in runtime.description


def test_a_device_that_is_not_there(block: Checkpoint, tmp_path: Path) -> None:
    done = export_bundle(block, tmp_path / "out", ExportOptions(format="aoti", device="cuda", max_sequence_length=16))
    with pytest.raises(InputError, match="was made for cuda"):
        load(done.path, device="cpu")
