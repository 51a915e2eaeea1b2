"""Whole models in onnxruntime's own operators: an attention a layer, a cache in place, rows padded anywhere."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import diffdeploy
from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import DiffAttentionV2Config, MlpConfig, RopeConfig
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.exporters import export_bundle
from diffdeploy.verify import verify_bundle
from tests.checkpoints.test_whole_models import diffllama
from tests.support.blocks import ROPE, make_config
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.models import decoder_weights, make_decoder, require_greedy_tokens_of_transformers
from tests.support.pairwise import rest_is_slow

SMALL = replace(SMALL_MODEL, onnx_flavor="ort")
WIDE = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": ROPE}

KINDS: dict[str, Any] = {
    "v2": make_decoder(
        num_layers=2,
        attention=DiffAttentionV2Config(embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, rope=ROPE),
        mlp=MlpConfig(hidden_dim=40, kind="polynorm"),
    ),
    "window": make_decoder(num_layers=2, attention=make_config(**WIDE, sliding_window=5)),
    "legacy": make_decoder(num_layers=2, attention=make_config(**WIDE, gqa_layout="legacy")),
    "interleaved": make_decoder(
        num_layers=2, attention=make_config(**{**WIDE, "rope": replace(ROPE, style="interleaved")}), tied=True
    ),
    "partial rotary": make_decoder(
        num_layers=2, attention=make_config(**{**WIDE, "rope": RopeConfig(style="half", theta=100.0, rotary_dim=4)})
    ),
    "no rotary": make_decoder(num_layers=2, attention=make_config(**{**WIDE, "rope": None})),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A DiffLlama with grouped heads as a bundle, and the model of transformers."""
    directory = tmp_path_factory.mktemp("llama")
    model, _, _ = diffllama(directory / "checkpoint", eos_token_id=7)
    export_bundle(read_model(directory / "checkpoint"), directory / "bundle", SMALL)
    return directory / "bundle", model


@pytest.mark.parametrize("kind", rest_is_slow(KINDS))
def test_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    found, config = read_model(SAMPLE), KINDS[kind]
    found = replace(found, config=config, weights=decoder_weights(config), companions=())
    # All cases with a past, padding and chunks that a short range has.
    done = export_bundle(found, tmp_path / "bundle", replace(SMALL, max_sequence_length=20, cases="full"))
    assert done.report is not None
    assert done.report.passed
    model = onnx.load(done.path / "model.onnx")
    assert Counter(node.op_type for node in model.graph.node)["GroupQueryAttention"] == config.num_layers


def test_one_attention_a_layer_and_every_weight_once(llama: tuple[Path, Any]) -> None:
    model, manifest = onnx.load(llama[0] / "model.onnx"), open_bundle(llama[0]).manifest
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["GroupQueryAttention"], counts["Attention"], counts["RotaryEmbedding"]) == (3, 0, 6)
    sizes = Counter(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    for shape, number in Counter(s for s in manifest.config.weight_shapes().values() if len(s) > 1).items():
        assert sizes[int(np.prod(shape))] >= number


def test_greedy_tokens_of_a_padded_batch_are_those_of_transformers(llama: tuple[Path, Any]) -> None:
    require_greedy_tokens_of_transformers(*llama)


def test_the_cache_is_written_in_place_and_nowhere_else(llama: tuple[Path, Any]) -> None:
    with diffdeploy.load(llama[0]) as runtime:
        buffers = runtime.buffers(1, 12, fill=np.nan)
        assert buffers is not None
        addresses = {name: array.ctypes.data for name, array in buffers.arrays().items()}
        ids = np.arange(10, 15)[None]
        given = {"attention_mask": np.ones((1, 5), np.int64), "position_ids": np.arange(5)[None]}
        buffers.run({"input_ids": ids, **given})
        for name, array in buffers.arrays().items():
            assert array.ctypes.data == addresses[name]
            assert np.isfinite(array[:, :, :5]).all()
            assert np.isnan(array[:, :, 5:]).all()
        # Everything else about it is what a call gives that hands its cache on.
        empty = {name: np.empty((1, 2, 0, 16), np.float32) for name in runtime.spec.caches}
        whole = runtime(input_ids=ids, **given, **empty)
        for name, present in runtime.spec.caches.items():
            np.testing.assert_array_equal(buffers.arrays()[name][:, :, :5], whole[present])


@pytest.mark.slow
@pytest.mark.parametrize("rows", rest_is_slow([3, 1]))
def test_a_conversation_is_that_of_the_standard_flavor(
    rows: int, bundles: BundleCache, llama: tuple[Path, Any]
) -> None:
    def talk(path: Path) -> list[Any]:
        drawn, turns = np.random.default_rng(rows), []
        with diffdeploy.load(path) as runtime:
            session = runtime.session()
            for length in (3, 5, 2):
                ids = drawn.integers(8, 96, (rows, length))
                mask = np.ones_like(ids)
                mask[-1, : length - 2] = 0
                # Rows end at different places, and go on together in the next turn.
                turns.append(session.generate(ids, mask, max_new_tokens=7, eos_token_id=[*range(8, 30)]))
        return turns

    checkpoint = llama[0].parent / "checkpoint"
    standard = bundles.bundle(read_model(checkpoint), replace(SMALL, onnx_flavor=None))
    for found, expected in zip(talk(llama[0]), talk(standard), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_holes_are_taken_without_a_window_and_refused_with_one(llama: tuple[Path, Any], tmp_path: Path) -> None:
    mask = np.array([[1, 0, 1, 1]])

    def call(path: Path) -> Any:
        with diffdeploy.load(path) as runtime:
            empty = {name: np.empty((1, 2, 0, 16), np.float32) for name in runtime.spec.caches}
            return runtime(
                input_ids=np.array([[3, 4, 5, 6]]), attention_mask=mask, position_ids=np.array([[0, 0, 1, 2]]), **empty
            )

    assert (call(llama[0])["logits"][0, 1] == 0).all()
    found, config = read_model(SAMPLE), KINDS["window"]
    found = replace(found, config=config, weights=decoder_weights(config), companions=())
    done = export_bundle(found, tmp_path / "bundle", replace(SMALL, max_sequence_length=12), verify=False)
    with pytest.raises(InputError, match="padding between the tokens of row 0"):
        call(done.path)


@pytest.mark.slow
def test_logits_of_the_last_token_of_each_row(tmp_path: Path) -> None:
    done = export_bundle(read_model(SAMPLE), tmp_path / "last", replace(SMALL, logits="last"))
    assert done.report is not None
    assert done.report.passed
    session = onnxruntime.InferenceSession(done.path / "model.onnx")
    shapes = {value.name: value.shape for value in session.get_inputs()}
    empty = {
        name: np.empty((2, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }

    def logits(ids: Any, mask: Any) -> Any:
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        return session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty})[
            0
        ]

    # As engines pad, on the right: what stands behind a row's last token is not taken for it.
    rows, mask = np.array([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]), np.array([[1, 1, 1, 0, 0], [1] * 5])
    found = logits(rows, mask)
    assert found.shape == (2, 1, 256)
    alone = logits(np.repeat(rows[:1, :3], 2, axis=0), np.ones((2, 3), np.int64))
    np.testing.assert_allclose(found[0], alone[0], atol=1e-5)


def test_what_the_operator_does_not_take_is_refused(tmp_path: Path) -> None:
    found = read_model(SAMPLE)
    for block, message in (
        (make_config(**{**WIDE, "head_dim": 6}), "multiples of 8, but keys and values of this model have 12"),
        (make_config(**WIDE, value_head_dim=24), "keys and values of the same width, .* have 16 and 24"),
    ):
        config = make_decoder(num_layers=1, attention=block)
        odd = replace(found, config=config, weights=decoder_weights(config), companions=())
        with pytest.raises(InputError, match=message):
            export_bundle(odd, tmp_path / "bundle", SMALL)
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_cannot_say_that_padding_counts_for_nothing(
    bundles: BundleCache, tmp_path: Path, llama: tuple[Path, Any]
) -> None:
    import shutil

    path = tmp_path / "bundle"
    for source, padding in (
        (llama[0], "anywhere"),
        (bundles.bundle(read_model(SAMPLE), replace(SMALL, onnx_flavor=None)), "counted"),
    ):
        shutil.copytree(source, path, dirs_exist_ok=True)
        manifest = open_bundle(source).manifest
        changed = manifest.graph.model_copy(update={"padding": padding})
        write_manifest(path, manifest.model_copy(update={"graph": changed}))
        with pytest.raises(IntegrityError, match="padding"):
            diffdeploy.load(path)
        shutil.rmtree(path)


def test_a_number_of_a_polynomial_norm_is_looked_for(tmp_path: Path) -> None:
    import shutil

    found, config = read_model(SAMPLE), KINDS["v2"]
    weights = decoder_weights(config)
    found = replace(found, config=config, weights=weights, companions=())
    done = export_bundle(found, tmp_path / "whole", replace(SMALL, max_sequence_length=12), verify=False)
    path = tmp_path / "bundle"
    shutil.copytree(done.path, path)
    model, number = onnx.load(path / "model.onnx"), weights["layers.1.ffn.act.weight"][1].float().numpy()
    for tensor in model.graph.initializer:
        if tensor.dims in ([], [1]) and onnx.numpy_helper.to_array(tensor) == number:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(number, np.float32(9)), tensor.name))
    onnx.save(model, path / "model.onnx")
    write_manifest(path, open_bundle(done.path).manifest)
    (check,) = (check for check in verify_bundle(path, cases=1).contract if check.name == "weights")
    assert "layers.1.ffn.act.weight is not in the graph bit for bit" in check.detail


@pytest.mark.parametrize("attribute", ["num_heads", "scale"])
def test_a_wrong_operator_is_found_in_its_layer(attribute: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "bundle"
    shutil.copytree(llama[0], path)
    model = onnx.load(path / "model.onnx")
    node = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    for each in node.attribute:
        if each.name == attribute == "scale":
            each.f *= 1.01
        elif each.name == attribute:
            each.i = 4  # of eight
    onnx.save(model, path / "model.onnx")
    write_manifest(path, open_bundle(llama[0]).manifest)
    report = verify_bundle(path, cases="quick")
    assert not report.passed
    if attribute == "scale":
        assert report.guilty is not None
        assert report.guilty.stage == "layer 1"
