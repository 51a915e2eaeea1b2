"""Models whose cache is written in place by programs of torch: right tokens, and no cell touched that is not theirs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffdeploy
from diffdeploy.bundle import frozen_module, open_bundle, read_weights
from diffdeploy.checkpoints import read_checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.engines.triton import deploy_to_triton
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.exporters.tracing import trace
from diffdeploy.graphs import Cache, graph_spec
from diffdeploy.verify import artifact_checks
from tests.checkpoints.test_whole_models import diffllama
from tests.support.blocks import ROPE, make_config
from tests.support.bundles import BundleCache
from tests.support.manifests import set_to
from tests.support.models import decoder_weights, make_decoder, require_greedy_tokens_of_transformers

SMALL = ExportOptions(
    format="pt2", graph="model", cache="in-place", max_batch_size=6, max_sequence_length=48, cases="quick"
)
CAPACITY = 49


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, bundles: BundleCache) -> tuple[Path, Any]:
    """A DiffLlama as a verified bundle, and the model of transformers."""
    directory = tmp_path_factory.mktemp("llama")
    model, _, _ = diffllama(directory)
    # Without the files beside it, whose paths differ from process to process.
    return bundles.bundle(replace(read_model(directory), companions=()), SMALL), model


def test_the_artifact_takes_buffers_and_the_runtime_what_it_always_takes(llama: tuple[Path, Any]) -> None:
    bundle = open_bundle(llama[0])
    spec = bundle.manifest.graph
    assert bundle.manifest.verified
    assert spec.inputs["past_key_values.0.key"].shape[2] == "past_sequence_length"
    artifact = spec.of_artifact()
    assert list(artifact.inputs) == list(spec.inputs)
    assert list(artifact.outputs) == ["logits"]
    assert artifact.inputs["past_key_values.0.key"].shape[2] == spec.capacity == CAPACITY


def test_greedy_tokens_of_a_padded_batch_are_those_of_transformers(llama: tuple[Path, Any]) -> None:
    require_greedy_tokens_of_transformers(*llama)


@pytest.mark.parametrize("lengths", [(5,), (1,), (3, 1, 4), (2, 2)])
def test_the_cache_is_written_in_place_and_nowhere_else(lengths: tuple[int, ...], llama: tuple[Path, Any]) -> None:
    total = sum(lengths)
    ids, mask = np.random.default_rng(0).integers(8, 96, (2, total)), np.ones((2, total), np.int64)
    mask[1, 0] = 0
    with diffdeploy.load(llama[0]) as runtime:
        buffers = runtime.buffers(2, 12, fill=np.nan)
        assert buffers is not None
        assert buffers.capacity == CAPACITY
        addresses = {name: array.ctypes.data for name, array in buffers.arrays().items()}
        start = 0
        for length in lengths:
            end = start + length
            positions = np.tile(np.arange(start, end), (2, 1))
            given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions}
            logits = buffers.run(given)
            start = end
        empty = {name: np.empty((2, *array.shape[1:2], 0, array.shape[3]), array.dtype)
                 for name, array in buffers.arrays().items()}  # fmt: skip
        whole = runtime(input_ids=ids, attention_mask=mask, position_ids=np.tile(np.arange(total), (2, 1)), **empty)
        np.testing.assert_allclose(logits[:, -1], whole["logits"][:, -1], rtol=2e-5, atol=2e-5)
        for name, array in buffers.arrays().items():
            assert array.ctypes.data == addresses[name]
            assert np.isnan(array[:, :, total:]).all()
            np.testing.assert_allclose(array[:, :, :total], whole[runtime.spec.caches[name]], rtol=2e-5, atol=2e-5)


def test_a_conversation_keeps_its_buffers(llama: tuple[Path, Any]) -> None:
    """Turns of a conversation, against one call with all that was said."""
    bundle, model = llama
    said: list[int] = []
    with diffdeploy.load(bundle) as runtime:
        session = runtime.session()
        for turn in ([[9, 10, 11]], [[20, 21]], [[30]]):
            whole = torch.tensor([[*said, *turn[0]]])
            expected = model.generate(whole, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist()
            answer = session.generate(np.array(turn), max_new_tokens=5, eos_token_id=None)
            said = expected
            assert answer[0].tolist()[-5:] == expected[-5:]


def test_a_sequence_that_fills_the_capacity(llama: tuple[Path, Any]) -> None:
    with diffdeploy.load(llama[0]) as runtime:
        assert runtime.generate(np.full((1, 40), 9), max_new_tokens=8, eos_token_id=None).shape == (1, 48)
        with pytest.raises(InputError, match="48"):
            runtime.generate(np.full((1, 40), 9), max_new_tokens=10, eos_token_id=None)


@pytest.mark.parametrize("name", ["onnx", "compile"])
def test_a_format_without_it_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache is in-place, which format"):
        export_bundle(read_model(SAMPLE), tmp_path / "bundle", replace(SMALL, format=name))
    assert not (tmp_path / "bundle").exists()


def test_a_block_has_no_such_cache(tmp_path: Path) -> None:
    from diffdeploy.checkpoints import CheckpointOptions

    block = read_checkpoint(SAMPLE, CheckpointOptions(layer=1))
    with pytest.raises(InputError, match="only graphs of models support"):
        export_bundle(block, tmp_path / "bundle", replace(SMALL, graph="cached"))


def test_triton_keeps_no_buffers(llama: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Triton keeps no buffers"):
        deploy_to_triton(open_bundle(llama[0]), tmp_path / "models", name="llama")


def test_a_manifest_that_says_another_cache_is_refused(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """The artifact was traced with buffers, and a manifest without them would have them handed on."""
    shutil.copytree(llama[0], tmp_path / "bundle")
    set_to(tmp_path / "bundle", ("graph", "cache"), "growing")
    bundle = open_bundle(tmp_path / "bundle")
    failed = {check.name for check in artifact_checks(bundle, read_weights(bundle)) if not check.passed}
    assert "interface" in failed


def test_a_format_that_writes_nothing_in_place_cannot_say_that_it_does(bundles: BundleCache, tmp_path: Path) -> None:
    source = bundles.bundle(read_model(SAMPLE), replace(SMALL, format="onnx", cache="growing", max_batch_size=4))
    shutil.copytree(source, tmp_path / "bundle")
    set_to(tmp_path / "bundle", ("graph", "cache"), "in-place")
    with pytest.raises(IntegrityError, match="cache"):
        diffdeploy.load(tmp_path / "bundle")


@pytest.mark.slow  # two traces by dynamo
def test_the_trace_of_one_cache_leaves_nothing_to_that_of_the_other() -> None:
    """In one process: what dynamo compared of views made the next trace fail."""
    config = make_decoder(num_layers=1, attention=make_config(rope=ROPE))
    block = frozen_module(config, decoder_weights(config), impl="rows", max_positions=16, dtype=torch.float32)
    caches: list[Cache] = ["in-place", "growing"]
    for cache in caches:
        spec = graph_spec("model", config, dtype="float32", max_batch_size=4, max_sequence_length=16, cache=cache)
        trace(block, spec)


@pytest.mark.slow
def test_compiled_in_place_it_writes_the_same_text(
    bundles: BundleCache, llama: tuple[Path, Any], tmp_path: Path
) -> None:
    """An AOTInductor package, verified, against the exported program."""
    diffllama(tmp_path)
    path = bundles.bundle(replace(read_model(tmp_path), companions=()), replace(SMALL, format="aoti"))
    ids = np.random.default_rng(2).integers(8, 96, (2, 7))
    texts = []
    for each in (llama[0], path):
        with diffdeploy.load(each, trust=True) as runtime:
            texts.append(runtime.generate(ids, max_new_tokens=30, eos_token_id=None))
    np.testing.assert_array_equal(*texts)
