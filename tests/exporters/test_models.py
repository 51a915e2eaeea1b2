"""Whole models: exported, verified, run, and found out where a layer is wrong."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

import diffdeploy
from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.errors import InputError
from diffdeploy.exporters import export_bundle
from diffdeploy.verify import verify_bundle
from tests.checkpoints.test_whole_models import diffllama
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.pairwise import rest_is_slow


@pytest.fixture(scope="module")
def sample_model(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), SMALL_MODEL)


@pytest.mark.parametrize(
    ("tied", "flavor"), rest_is_slow([(True, "ort"), (True, "standard"), (False, "ort"), (False, "standard")])
)
def test_matrices_that_the_exporter_does_not_turn(
    tied: bool, flavor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves matrices of more than 2 GiB as they are, with a ``Transpose``; here it leaves all."""
    from onnxscript.optimizer import _constant_folding

    monkeypatch.setattr(_constant_folding, "_DEFAULT_ALWAYS_FOLD_OPS", frozenset())
    diffllama(tmp_path / "checkpoint", tie_word_embeddings=tied)
    turned: list[str] = []
    save = onnx_ir.save

    def look(model: onnx_ir.Model, *given: Any, **named: Any) -> None:
        turned.extend(
            node.op_type for node in model.graph if node.op_type == "Transpose" and _is_matrix(node.inputs[0])
        )
        save(model, *given, **named)

    monkeypatch.setattr(onnx_ir, "save", look)
    options = replace(SMALL_MODEL, onnx_flavor=flavor)
    export_bundle(read_model(tmp_path / "checkpoint"), tmp_path / "bundle", options)  # verified
    assert not turned


def _is_matrix(value: "onnx_ir.Value | None") -> bool:
    return value is not None and value.const_value is not None


def test_the_bundle_says_what_it_holds(sample_model: Path) -> None:
    manifest = open_bundle(sample_model).manifest
    assert manifest.verified
    layers = range(4)
    assert list(manifest.graph.inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{n}.{side}" for n in layers for side in ("key", "value")),
    ]
    assert list(manifest.graph.outputs) == ["logits", *(f"present.{n}.{s}" for n in layers for s in ("key", "value"))]
    assert manifest.graph.outputs["logits"].shape == ("batch_size", "sequence_length", 256)
    assert {"config.json", "tokenizer.json"} <= manifest.files.keys()


def test_two_attentions_a_layer_and_every_weight_once(sample_model: Path, llama_pair: tuple[Path, Any]) -> None:
    for path in (sample_model, llama_pair[0]):
        model, manifest = onnx.load(path / "model.onnx"), open_bundle(path).manifest
        counts = Counter(node.op_type for node in model.graph.node)
        assert counts["Attention"] == 2 * len(manifest.config.blocks)
        sizes = Counter(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
        matrices = Counter(int(np.prod(s)) for s in manifest.config.weight_shapes().values() if len(s) > 1)
        for size, number in matrices.items():
            assert sizes[size] == number, (size, number)


def test_greedy_tokens_are_those_of_transformers(llama_pair: tuple[Path, Any]) -> None:
    bundle, model = llama_pair
    ids = torch.randint(8, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with diffdeploy.load(bundle) as runtime:
        found = runtime.generate(ids, max_new_tokens=20, eos_token_id=None)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_left_padding_changes_no_token_and_eos_ends_a_row(llama_pair: tuple[Path, Any]) -> None:
    with diffdeploy.load(llama_pair[0]) as runtime:
        prompt = np.arange(10, 19)[None]
        alone = runtime.generate(prompt, max_new_tokens=12, eos_token_id=None)
        padded = np.concatenate((np.zeros((1, 4), np.int64), prompt), axis=1)
        rows = np.concatenate((padded, np.arange(20, 33)[None]))
        mask = np.ones_like(rows)
        mask[0, :4] = 0
        both = runtime.generate(rows, mask, max_new_tokens=12, eos_token_id=None)
        np.testing.assert_array_equal(both[0, 4:], alone[0])
        third = int(alone[0, 11])
        first = list(alone[0, 9:]).index(third)
        ended = runtime.generate(rows, mask, max_new_tokens=12, eos_token_id=third, pad_token_id=1)
        np.testing.assert_array_equal(ended[0, 4 : 4 + 9 + first + 1], alone[0, : 9 + first + 1])
        assert (ended[0, 4 + 9 + first + 1 :] == 1).all()
        forced = runtime.generate(prompt, max_new_tokens=12, eos_token_id=third, min_new_tokens=12)
        assert third not in forced[0, 9:20]


def test_sampling_follows_its_seed(sample_model: Path) -> None:
    prompt = np.frombuffer(b"def f(", np.uint8).astype(np.int64)[None]
    with diffdeploy.load(sample_model) as runtime:
        drawn = [runtime.generate(prompt, max_new_tokens=24, do_sample=True, seed=seed, top_k=20) for seed in (1, 1, 2)]
        greedy = runtime.generate(prompt, max_new_tokens=24)
        nearly = runtime.generate(prompt, max_new_tokens=24, do_sample=True, top_k=1)
        certain = runtime.generate(prompt, max_new_tokens=24, do_sample=True, top_p=1e-9)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(nearly, greedy)
    np.testing.assert_array_equal(certain, greedy)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "the prompt is empty"),
        (
            [[1] * 40],
            {"max_new_tokens": 20},
            "the prompt has 40 tokens and 20 will follow; the bundle was exported for 48 tokens",
        ),
        ([[1, 256]], {}, "input_ids holds numbers from 1 to 256; accepted: 0 to 255"),
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1, 2]], {"temperature": 0.0, "do_sample": True}, "temperature is 0.0; accepted: a number above 0"),
        ([[1, 2]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1, 2]], {"num_beams": 2}, "num_beams is not an option"),
        ([[1, 2]], {"attention_mask": np.array([[1, 0]])}, "attention_mask ends in padding"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    prompt: list[list[int]], options: dict[str, Any], message: str, sample_model: Path
) -> None:
    with diffdeploy.load(sample_model) as runtime, pytest.raises(InputError, match=message):
        runtime.generate(np.array(prompt, np.int64), **{"max_new_tokens": 4, **options})


def test_a_block_gives_no_tokens(sample_bundle: Path) -> None:
    with diffdeploy.load(sample_bundle) as runtime, pytest.raises(InputError, match="holds a block"):
        runtime.generate(np.ones((1, 2), np.int64), max_new_tokens=1)


def spoil(bundle: Bundle, name: str, factor: float) -> None:
    """Change the initializer that holds a weight."""
    from diffdeploy.bundle import read_weights

    weight, path = read_weights(bundle)[name], bundle.path / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        held = onnx.numpy_helper.to_array(tensor)
        if any(held.shape == form.shape and (held == form).all() for form in (weight, weight.T)):
            tensor.CopyFrom(onnx.numpy_helper.from_array(held * np.float32(factor), tensor.name))
            break
    else:
        raise AssertionError(name)
    onnx.save(model, path)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("weight", ["self_attn.v_proj.weight", "ffn.up_proj.weight"])
def test_the_layer_that_is_wrong_is_named(layer: int, weight: str, sample_model: Path, tmp_path: Path) -> None:
    import shutil

    from diffdeploy.bundle import write_manifest

    path = tmp_path / "bundle"
    shutil.copytree(sample_model, path)
    spoil(open_bundle(path), f"layers.{layer}.{weight}", 1.01)
    write_manifest(path, open_bundle(sample_model).manifest)
    report = verify_bundle(path, cases="quick")
    assert not report.passed
    assert report.guilty is not None
    assert report.guilty.stage == f"layer {layer}"
    wrong = [case.id for case in report.cases if case.group == "each layer" and not case.passed]
    assert wrong == [f"layer{layer}"]


@pytest.mark.slow
def test_logits_of_the_last_position_alone(tmp_path: Path) -> None:
    from dataclasses import replace

    done = export_bundle(read_model(SAMPLE), tmp_path / "last", replace(SMALL_MODEL, logits="last"))
    assert done.report is not None
    assert done.report.passed
    with diffdeploy.load(done.path) as runtime:
        assert runtime.spec.outputs["logits"].shape == ("batch_size", 1, 256)
        assert runtime.generate(np.ones((2, 3), np.int64), max_new_tokens=3).shape == (2, 6)


@pytest.mark.slow
def test_norms_that_are_all_1_may_be_one_constant(tmp_path: Path) -> None:
    from dataclasses import replace

    found = read_model(SAMPLE)
    ones = {n: torch.ones_like(w) if n.endswith("norm.weight") else w for n, w in found.weights.items()}
    done = export_bundle(replace(found, weights=ones), tmp_path / "ones", SMALL_MODEL)
    assert done.report is not None
    assert done.report.passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16"])
def test_half_precision(dtype: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    done = export_bundle(read_model(SAMPLE), tmp_path / "half", replace(SMALL_MODEL, dtype=dtype))
    assert done.report is not None
    assert done.report.passed


@pytest.mark.slow
def test_what_is_compiled_afresh_gives_the_last_position_too(bundles: BundleCache) -> None:
    from dataclasses import replace

    path = bundles.bundle(read_model(SAMPLE), replace(SMALL_MODEL, format="compile", logits="last"))
    with diffdeploy.load(path, recompile=True) as runtime:
        inputs = {name: np.zeros((2, *shape[1:]), dtype) for name, (dtype, shape) in _empty_past(runtime).items()}
        inputs["attention_mask"][:] = 1
        assert runtime(**inputs)["logits"].shape == (2, 1, 256)


def _empty_past(runtime: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each input, of three tokens behind an empty past."""
    sizes = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 0, "total_sequence_length": 3}
    return {
        name: (tensor.dtype, tuple(sizes.get(axis, axis) for axis in tensor.shape))
        for name, tensor in runtime.spec.inputs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt2", "aoti", "compile"])
def test_every_format_writes_the_same_text(name: str, sample_model: Path, bundles: BundleCache) -> None:
    from dataclasses import replace

    path = bundles.bundle(read_model(SAMPLE), replace(SMALL_MODEL, format=name))
    prompt = np.frombuffer(b"def main(argv", np.uint8).astype(np.int64)[None]
    texts = []
    for each in (sample_model, path):
        with diffdeploy.load(each, trust=True) as runtime:
            texts.append(runtime.generate(prompt, max_new_tokens=30))
    np.testing.assert_array_equal(*texts)
