"""Bundles on disk: whole or not at all, and every changed byte is seen."""

import fcntl
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdeploy import load
from diffdeploy.bundle import (
    WEIGHTS,
    Environment,
    ExportRecord,
    Manifest,
    Provenance,
    open_bundle,
    staged_bundle,
    write_manifest,
)
from diffdeploy.errors import DiffDeployError, InputError, IntegrityError, UnverifiedWarning
from diffdeploy.exporters import ExportOptions, lower_block
from diffdeploy.formats import distributions
from diffdeploy.graphs import graph_spec
from diffdeploy.modules import DiffAttention
from tests.support.blocks import make_config, random_weights


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "block"
    config = make_config()
    weights = {name: tensor.float() for name, tensor in random_weights(config).items()}
    spec = graph_spec("plain", config, dtype="float32", max_batch_size=4, max_sequence_length=16)
    with staged_bundle(output) as staging:
        save_file(weights, staging / WEIGHTS)
        lower_block(
            DiffAttention.from_weights(config, weights, impl="two_call", max_positions=16),
            spec,
            staging,
            ExportOptions(),
        )
        manifest = Manifest(
            format="onnx",
            config=config,
            graph=spec,
            options=ExportRecord(attention_impl="two_call", seed=0, opset=23, flavor="standard"),
            verified=False,
            environment=Environment.current(distributions()),
            provenance=Provenance(files={}, layout="microsoft", layer=None, keys=[], options={}),
            files={},
        )
        write_manifest(staging, manifest)
    return output


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "weights.safetensors"])
def test_a_changed_byte_is_seen(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(IntegrityError):
        open_bundle(bundle)


def test_missing_and_extra_files_are_seen(bundle: Path) -> None:
    (bundle / "extra").write_bytes(b"")
    with pytest.raises(IntegrityError, match="does not list: extra"):
        open_bundle(bundle)
    (bundle / "extra").unlink()
    (bundle / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"lacks model\.onnx"):
        open_bundle(bundle)


def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    files = {**manifest.files, "../model.onnx": manifest.files["model.onnx"]}
    (bundle / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).to_bytes())
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        open_bundle(bundle)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_bundle(tmp_path / "new" / "out") as staging:
            (staging / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_taken_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for force in (False, True):
        with pytest.raises(InputError, match="give another --output"), staged_bundle(tmp_path, force=force):
            pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_force_replaces_a_bundle(bundle: Path) -> None:
    with staged_bundle(bundle, force=True) as staging:
        (staging / "only").write_text("new")
    assert [file.name for file in bundle.iterdir()] == ["only"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_runtime_runs_torch_and_numpy_alike(bundle: Path) -> None:
    runtime = load(bundle)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    output = runtime(hidden_states=x)["output"]
    assert isinstance(output, torch.Tensor)
    np.testing.assert_array_equal(runtime(hidden_states=x.numpy())["output"], output.numpy())


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 5, 24), torch.float32, "batch_size of hidden_states is 5; accepted: 1 to 4"),
        ((1, 17, 24), torch.float32, "sequence_length of hidden_states is 17; accepted: 1 to 16"),
        ((1, 0, 24), torch.float32, "sequence_length of hidden_states is 0"),
        ((1, 5, 23), torch.float32, "has shape"),
        ((5, 24), torch.float32, "has shape"),
        ((1, 5, 24), torch.float64, "has dtype float64; accepted: float32"),
    ],
)
def test_runtime_refuses_wrong_inputs(pristine: Path, shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(pristine)(hidden_states=torch.zeros(shape, dtype=dtype))


def test_runtime_refuses_wrong_names(pristine: Path) -> None:
    with pytest.raises(DiffDeployError, match="inputs are"):
        load(pristine)(x=torch.zeros(1, 1, 24))


def test_what_a_killed_export_left_is_removed(bundle: Path) -> None:
    parent, hours_ago = bundle.parent, time.time() - 10_000
    dead, young, alive = (parent / f".bundle.new-{name:_<8}" for name in ("dead", "young", "alive"))
    for folder in (dead, young, alive):
        (folder / "half").mkdir(parents=True)
    for folder in (dead, alive):
        os.utime(folder, (hours_ago, hours_ago))
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with staged_bundle(bundle, force=True) as staging:
        (staging / "only").write_text("new")
        assert not dead.exists()
        # Its owner may come back for it at any moment.
        assert young.exists()
        assert alive.exists()
    os.close(descriptor)


def test_a_bundle_that_a_killed_export_set_aside_comes_back(bundle: Path) -> None:
    aside = bundle.parent / ".bundle.old-12345678"
    bundle.rename(aside)
    with pytest.raises(InputError, match="not empty"), staged_bundle(bundle):
        pass
    assert sorted(file.name for file in bundle.iterdir()) == ["manifest.json", "model.onnx", "weights.safetensors"]
    assert not aside.exists()


def test_an_unverified_bundle_says_so(pristine: Path) -> None:
    with pytest.warns(UnverifiedWarning, match="was exported without verification"):
        runtime = load(pristine)
    assert not runtime.verified


def test_inputs_without_names_are_refused(pristine: Path) -> None:
    with pytest.raises(InputError, match="1 inputs have no name; accepted: the names hidden_states"):
        load(pristine)(torch.zeros(1, 2, 24))


def test_a_folder_of_the_user_beside_a_bundle_is_kept(bundle: Path) -> None:
    own = bundle.parent / ".bundle.old-my-notes"
    own.mkdir()
    with staged_bundle(bundle, force=True) as staging:
        (staging / "only").write_text("new")
    assert own.is_dir()


def test_a_manifest_that_says_verified_without_a_report_is_not_believed(bundle: Path) -> None:
    write_manifest(bundle, open_bundle(bundle).manifest.model_copy(update={"verified": True}))
    with pytest.warns(UnverifiedWarning, match="was exported without verification"):
        assert not load(bundle).verified
