"""Exported programs and AOTInductor packages: verified, loaded without diffdeploy, held to their ranges and weights."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy import load
from diffdeploy.arrays import read_safetensors
from diffdeploy.bundle import frozen_module, open_bundle, write_manifest
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.exporters import ExportOptions, export, export_bundle
from diffdeploy.formats import RunOptions
from diffdeploy.graphs import DType, Variant
from diffdeploy.modules import DiffAttention, block_class
from diffdeploy.selftest.constant_fault import next_bit
from diffdeploy.verify import RejectedError, artifact_checks, verify_bundle
from tests.support.blocks import checkpoint_of, make_config, random_weights
from tests.support.bundles import FormatBundle, options_of
from tests.support.pairwise import each_value

ALONE = """
import sys, torch
sys.modules["diffdeploy"] = None  # an import of it would fail
torch.manual_seed(0)
x = torch.randn(1, 3, 128)
{load}
(output,) = run(x)
torch.save((x, output), sys.argv[2])
"""
LOADERS = {
    "pt2": "run = torch.export.load(sys.argv[1]).module()",
    "aoti": "run = torch._inductor.aoti_load_package(sys.argv[1])",
}


@pytest.mark.slow
@each_value(graph=["masked", "cached"], dtype=["float16", "float32"])
def test_pt2_of_every_variant(graph: Variant, dtype: DType, sample: Checkpoint, tmp_path: Path) -> None:
    options = ExportOptions(
        format="pt2", graph=graph, dtype=dtype, max_batch_size=4, max_sequence_length=70, cases="quick"
    )
    done = export_bundle(sample, tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed
    assert done.facts.attention_ops == 2


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("impl", ["two_call", "padded"])
def test_pt2_of_grouped_heads_of_the_legacy_key_map(impl: str, group_size: int, tmp_path: Path) -> None:
    """Values are repeated there; before torch 2.13 joined axes became a guard that no range satisfies."""
    heads = {"num_heads": 2 * group_size, "num_kv_heads": 2, "head_dim": 4, "gqa_layout": "legacy"}
    options = ExportOptions(format="pt2", impl=impl, max_batch_size=4, max_sequence_length=70)
    export_bundle(checkpoint_of(make_config(embed_dim=16, **heads)), tmp_path / "out", options, verify=False)
    with load(tmp_path / "out") as runtime:
        for length in (1, 2, 70):
            assert runtime(hidden_states=np.ones((3, length, 16), np.float32))["output"].shape == (3, length, 16)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["masked", "cached"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_aoti_of_every_variant(graph: Variant, dtype: DType, sample: Checkpoint, tmp_path: Path) -> None:
    options = ExportOptions(
        format="aoti", graph=graph, dtype=dtype, max_batch_size=4, max_sequence_length=70, cases="quick"
    )
    done = export_bundle(sample, tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed


@pytest.mark.parametrize("name", LOADERS)
def test_loads_without_diffdeploy(name: str, format_bundle: FormatBundle, sample: Checkpoint, tmp_path: Path) -> None:
    code = ALONE.format(load=LOADERS[name])
    model, result = format_bundle(name) / "model.pt2", tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", code, str(model), str(result)], check=True, capture_output=True)
    x, output = torch.load(result)
    block = block_class(sample.config).from_weights(sample.config, sample.weights)
    torch.testing.assert_close(output, block(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOADERS)
def test_the_runtime_holds_the_ranges(name: str, format_bundle: FormatBundle) -> None:
    runtime = load(format_bundle(name))
    assert runtime(hidden_states=np.ones((4, 70, 128), np.float32))["output"].shape == (4, 70, 128)
    for shape in ((5, 1, 128), (1, 71, 128), (0, 1, 128)):
        with pytest.raises(InputError, match="accepted: 1 to"):
            runtime(hidden_states=np.ones(shape, np.float32))


def test_pt2_has_the_same_bytes_twice(format_bundle: FormatBundle, sample: Checkpoint, tmp_path: Path) -> None:
    options = options_of("pt2")
    again = export_bundle(sample, tmp_path / "again", options).path
    for file in again.iterdir():
        assert file.read_bytes() == (format_bundle("pt2") / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", LOADERS)
def test_no_local_path_is_left(name: str, format_bundle: FormatBundle) -> None:
    assert str(Path(export.__file__).resolve().parent).encode() not in (format_bundle(name) / "model.pt2").read_bytes()


def test_a_faulty_program_is_refused(sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = frozen_module

    def spoiled(*arguments: Any, **options: Any) -> Any:
        block = build(*arguments, **options)
        assert isinstance(block, DiffAttention)
        block.v_proj.weight = torch.nn.Parameter(block.v_proj.weight.clone(), requires_grad=False)
        block.v_proj.weight[5, 7] *= 1.001
        return block

    monkeypatch.setattr(export, "frozen_module", spoiled)
    with pytest.raises(RejectedError) as refused:
        export_bundle(sample, tmp_path / "out", ExportOptions(format="pt2", max_sequence_length=70, cases="quick"))
    report = refused.value.report
    assert [check.name for check in report.contract if not check.passed] == ["weights"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_aoti_package_of_other_weights_is_seen(format_bundle: FormatBundle, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in format_bundle("aoti").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "weights.safetensors")
    weights["q_proj.weight"][0, 0] *= 1.001
    save_file(weights, copy / "weights.safetensors")
    write_manifest(copy, open_bundle(format_bundle("aoti")).manifest)
    failed = [
        check.name for check in verify_bundle(copy, run_options=RunOptions(trust=True)).contract if not check.passed
    ]
    assert "weights" in failed


def test_what_a_format_does_not_have_is_refused(
    sample: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="opset is 23, which format pt2 does not have"):
        export_bundle(sample, tmp_path / "out", ExportOptions(format="pt2", opset=23))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="no-such-compiler is not found"):
        export_bundle(sample, tmp_path / "out", ExportOptions(format="aoti"))


@pytest.mark.slow
def test_weights_that_are_written_into_the_code_are_compared_too(tmp_path: Path) -> None:
    """Inductor makes numbers in the source of a tensor of 8 elements, as a norm over two channels of 4 is."""
    config = make_config(embed_dim=32, head_dim=4)
    weights = {name: tensor.float() for name, tensor in random_weights(config).items()}
    checkpoint = Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))
    options = ExportOptions(format="aoti", dtype="float16", max_sequence_length=16)
    path = export_bundle(checkpoint, tmp_path / "bundle", options, verify=False).path
    assert verify_bundle(path, cases="quick").passed
    bundle, arrays = open_bundle(path), read_safetensors(path / "weights.safetensors")
    arrays["subln.weight"] = next_bit(arrays["subln.weight"])
    failed = [check for check in artifact_checks(bundle, arrays) if not check.passed]
    assert [check.detail for check in failed] == ["subln.weight is not in the package bit for bit"]
