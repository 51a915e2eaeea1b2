"""Models with quantised matrices: verified against the numbers that those are, and found out where a bit is another."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import diffdeploy
from diffdeploy.bundle import WEIGHTS, open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import InputError, IntegrityError, VerificationError
from diffdeploy.exporters import Export, ExportOptions, export_bundle
from diffdeploy.verify import verify_bundle
from diffdeploy.verify.checkpoint_match import matches_checkpoint
from diffdeploy.verify.report import read_report
from tests.checkpoints.test_whole_models import diffllama
from tests.exporters.test_ort_models import KINDS, SMALL, WIDE
from tests.support.blocks import make_config
from tests.support.bundles import BundleCache
from tests.support.models import decoder_weights, make_decoder
from tests.support.pairwise import rest_is_slow

INT4 = replace(SMALL, weights="int4")


@pytest.fixture(scope="module", params=rest_is_slow(["int4", "int8"]))
def sample(request: pytest.FixtureRequest, bundles: BundleCache) -> Path:
    """The sample, verified with a quick sweep. Shared: copy before changing."""
    return bundles.bundle(read_model(SAMPLE), replace(SMALL, weights=request.param))


@pytest.fixture(scope="module")
def int4(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), INT4)


def matrices_of(config: Any) -> set[str]:
    return {name for name in config.weight_shapes() if name.startswith("layers") and "_proj.weight" in name}


def test_the_sample_passes_and_says_what_it_lost(sample: Path) -> None:
    bundle = open_bundle(sample)
    how = bundle.manifest.options.quantisation
    assert how is not None
    assert (how.block_size, how.head, how.accuracy_level) == (32, False, 0)
    model, stored = onnx.load(sample / "model.onnx"), load_file(sample / WEIGHTS)
    counts = Counter(node.op_type for node in model.graph.node)
    # Seven matrices a layer, and the head as it was.
    assert (counts["MatMulNBits"], counts["MatMul"]) == (28, 1)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in matrices_of(bundle.manifest.config):
        for part in (f"{name}.blocks", f"{name}.scales"):
            np.testing.assert_array_equal(held[part], stored[part])
        assert name not in stored
    report = read_report(sample / "verification.json")
    assert report.passed
    assert report.greedy_tokens_checked
    loss = report.loss
    assert loss is not None
    assert (loss.text, list(loss.layers)) == ("filecmp.py", [f"layer{number}" for number in range(4)])
    # An eighth as many steps a number is an eighth of a bit and more.
    assert (loss.agreement > 0.99) == (how.bits == 8)
    assert (loss.kl < 1e-3) == (how.bits == 8)
    assert abs(loss.bits_per_byte - loss.original_bits_per_byte) < 0.05
    with diffdeploy.load(sample) as runtime:
        tokens = runtime.generate(torch.tensor([list(b"def main(")]), max_new_tokens=20)
    assert bytes(tokens[0].tolist()).startswith(b"def main(")
    assert matches_checkpoint(sample, SAMPLE).passed


# Kinds of models, and how they are quantised.
EVERY_KIND = [
    ("v2", {"weights": "int4", "block_size": 16}),
    ("legacy", {"weights": "int8", "block_size": 256}),
    ("interleaved", {"weights": "int4", "block_size": 32, "quantise_head": True}),
    ("partial rotary", {"weights": "int8", "block_size": 16, "quantise_head": True, "logits": "last"}),
]


def export_of(config: DecoderConfig, path: Path, **options: Any) -> Export:
    """Export a model with random weights, and verify it."""
    found = replace(read_model(SAMPLE), config=config, weights=decoder_weights(config), companions=())
    return export_bundle(found, path, replace(SMALL, max_sequence_length=20, **options))


@pytest.mark.parametrize(
    ("kind", "options"), rest_is_slow([*EVERY_KIND, ("biases", {"weights": "int4", "block_size": 16})])
)
def test_models_of_every_kind(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    biased = make_decoder(num_layers=2, attention=make_config(**WIDE, qkv_bias=True, out_bias=True))
    config = {**KINDS, "biases": biased}[kind]
    done = export_of(config, tmp_path / "bundle", **options)
    assert done.report is not None
    assert done.report.passed
    assert done.loss is None  # without a tokenizer there is no text
    model = onnx.load(done.path / "model.onnx")
    counts = Counter(node.op_type for node in model.graph.node)
    head = options.get("quantise_head", False)
    assert counts["MatMulNBits"] == 14 + head
    # A tied head that is quantised is a matrix of its own, and the embedding stays.
    manifest = open_bundle(done.path).manifest
    assert getattr(manifest.config, "tied") is (config.tied and not head)  # noqa: B009 - of a decoder
    embedding = read_weights(open_bundle(done.path))["embedding.weight"]
    np.testing.assert_array_equal(embedding, decoder_weights(config)["embedding.weight"].float().numpy())


@pytest.mark.slow
def test_a_tied_head_is_untied_and_still_that_of_its_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    diffllama(source, tie_word_embeddings=True, eos_token_id=7)
    options = replace(INT4, block_size=16, quantise_head=True, cases=1)
    done = export_bundle(read_model(source), tmp_path / "bundle", options)
    stored, weights = load_file(done.path / WEIGHTS), read_weights(open_bundle(done.path))
    assert {"embedding.weight", "lm_head.weight.blocks", "lm_head.weight.scales"} <= stored.keys()
    # Rounded to steps of the head's own scales, of which a block has sixteen.
    error = np.abs(weights["lm_head.weight"] - weights["embedding.weight"])
    assert 0 < error.max() <= np.abs(stored["lm_head.weight.scales"]).max() * 1.001
    check = matches_checkpoint(done.path, source)
    assert check.passed, check.detail


def test_equal_matrices_are_held_once(tmp_path: Path) -> None:
    found, config = read_model(SAMPLE), make_decoder(num_layers=2, attention=make_config(**WIDE))
    weights = decoder_weights(config)
    for name in ("ffn.gate_proj.weight", "self_attn.q_proj.weight"):
        weights[f"layers.1.{name}"] = weights[f"layers.0.{name}"]
    found = replace(found, config=config, weights=weights, companions=())
    done = export_bundle(found, tmp_path / "bundle", replace(INT4, max_sequence_length=20, cases=1))
    nodes = [node for node in onnx.load(done.path / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 14
    assert len({node.input[1] for node in nodes}) == 12


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    assert isinstance(found, onnx.TensorProto)
    return found


def change_block(model: onnx.ModelProto) -> None:
    tensor = constant(model, products(model)[3].input[1])
    blocks = onnx.numpy_helper.to_array(tensor).copy()
    blocks[2, 1, 3] ^= 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(blocks, tensor.name))


def change_scale(model: onnx.ModelProto) -> None:
    tensor = constant(model, products(model)[3].input[2])
    scales = onnx.numpy_helper.to_array(tensor).copy()
    scales[2, 1] = np.nextafter(scales[2, 1], np.float32(9))
    tensor.CopyFrom(onnx.numpy_helper.from_array(scales, tensor.name))


def swap_scales(model: onnx.ModelProto) -> None:
    # Those of keys and values, which have one shape.
    one, other = products(model)[1], products(model)[2]
    one.input[2], other.input[2] = other.input[2], one.input[2]


def swap_matrices(model: onnx.ModelProto) -> None:
    one, other = products(model)[1], products(model)[8]
    for index in (1, 2):
        one.input[index], other.input[index] = other.input[index], one.input[index]


def use_twice(model: onnx.ModelProto) -> None:
    one, other = products(model)[1], products(model)[2]
    for index in (1, 2):
        other.input[index] = one.input[index]


def lower_accuracy(model: onnx.ModelProto) -> None:
    products(model)[0].attribute.append(onnx.helper.make_attribute("accuracy_level", 4))


def add_zero_points(model: onnx.ModelProto) -> None:
    node = products(model)[0]
    rows, num_blocks = constant(model, node.input[2]).dims
    zeros = np.full((rows, (num_blocks + 1) // 2), 0x88, np.uint8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, "zero_points"))
    node.input.append("zero_points")


def change_size(model: onnx.ModelProto) -> None:
    (size,) = (each for each in products(model)[0].attribute if each.name == "block_size")
    size.i = 64


CONTRACT: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "block": (change_block, "does not hold; layers.0.self_attn.out_proj.weight is not in the graph bit for bit"),
    "scale": (change_scale, "does not hold; layers.0.self_attn.out_proj.weight is not in the graph bit for bit"),
    "scales of another": (swap_scales, "does not hold"),
    "one twice": (use_twice, "layers.0.self_attn.v_proj.weight is not in the graph bit for bit"),
    "accuracy level": (lower_accuracy, "'accuracy_level': 4"),
    "zero points": (add_zero_points, "does not hold"),
    "size of blocks": (change_size, "'block_size': 64"),
}


def changed(source: Path, path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy with another model, signed anew."""
    shutil.copytree(source, path)
    model = onnx.load(path / "model.onnx")
    change(model)
    onnx.save(model, path / "model.onnx")
    write_manifest(path, open_bundle(source).manifest)
    return path


@pytest.mark.parametrize("name", rest_is_slow(CONTRACT, quick=4))
def test_what_is_not_the_quantised_matrix_is_found(name: str, int4: Path, tmp_path: Path) -> None:
    change, message = CONTRACT[name]
    report = verify_bundle(changed(int4, tmp_path / "bundle", change), cases=1)
    (check,) = (check for check in report.contract if check.name == "quantised")
    assert not check.passed
    assert message in check.detail


def test_matrices_in_each_others_places_are_found_in_their_layer(int4: Path, tmp_path: Path) -> None:
    # The contract sees every matrix, and not where.
    report = verify_bundle(changed(int4, tmp_path / "bundle", swap_matrices), cases=1)
    assert not report.passed
    assert report.guilty is not None
    assert report.guilty.stage == "layer 0"


STORED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda arrays: arrays.pop("layers.0.ffn.up_proj.weight.scales"), "lacks .*up_proj.weight.scales"),
    "a matrix": (
        lambda arrays: arrays.update({"layers.0.ffn.up_proj.weight": np.zeros((344, 128), np.float32)}),
        "also holds layers.0.ffn.up_proj.weight",
    ),
    "wide scales": (
        lambda arrays: arrays.update({"layers.0.ffn.up_proj.weight.scales": np.zeros((344, 5), np.float32)}),
        r"is F32 \[344, 5\]; .* has F32 \[344, 4\]",
    ),
    "floats": (
        lambda arrays: arrays.update({"layers.0.ffn.up_proj.weight.blocks": np.zeros((344, 4, 16), np.float32)}),
        r"is F32 \[344, 4, 16\]; .* has U8",
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_a_weights_file_of_other_blocks_is_refused(name: str, int4: Path, tmp_path: Path) -> None:
    change, message = STORED[name]
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    arrays = load_file(path / WEIGHTS)
    change(arrays)
    save_file(arrays, path / WEIGHTS)
    write_manifest(path, open_bundle(int4).manifest)
    with pytest.raises(IntegrityError, match=message):
        open_bundle(path)


def test_other_blocks_in_the_weights_file_are_found(int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    arrays = {name: array.copy() for name, array in load_file(path / WEIGHTS).items()}
    arrays["layers.2.ffn.up_proj.weight.blocks"][0, 0, 0] ^= 1
    save_file(arrays, path / WEIGHTS)
    write_manifest(path, open_bundle(int4).manifest)
    failed = {check.name for check in verify_bundle(path, cases=1).contract if not check.passed}
    assert {"quantised", "golden"} <= failed
    assert not matches_checkpoint(path, SAMPLE).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 64}, "weights.safetensors"),
        ({"weights": "int8"}, "weights.safetensors"),
        ({"head": True}, "weights.safetensors also holds lm_head.weight"),
    ],
)
def test_a_manifest_with_another_quantisation_is_refused(
    changes: dict[str, Any], message: str, int4: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    manifest = open_bundle(int4).manifest
    how = manifest.options.quantisation
    assert how is not None
    options = manifest.options.model_copy(update={"quantisation": how.model_copy(update=changes)})
    write_manifest(path, manifest.model_copy(update={"options": options}))
    with pytest.raises(IntegrityError, match=message):
        open_bundle(path)


def test_a_manifest_cannot_say_that_another_flavor_is_quantised(int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    manifest = open_bundle(int4).manifest
    spec = manifest.graph.model_copy(update={"padding": "anywhere"})
    options = manifest.options.model_copy(update={"flavor": "standard"})
    write_manifest(path, manifest.model_copy(update={"options": options, "graph": spec}))
    with pytest.raises(IntegrityError, match="quantised weights True, which no export to format onnx writes"):
        diffdeploy.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    rest_is_slow(
        [
            ({"max_kl": 1e-4}, "lose too much and were not kept: KL is .* nats per token, but the limit is 0.0001"),
            ({"min_agreement": 0.999}, "lose too much and were not kept: the top token is the same for 0.9"),
        ]
    ),
)
def test_a_loss_beyond_what_was_asked_for_keeps_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("def main() -> None:\n    print('a short text')\n" * 4)
    with pytest.raises(VerificationError, match=message):
        export_bundle(read_model(SAMPLE), tmp_path / "bundle", replace(INT4, text=text, **changes), verify=False)
    assert list(tmp_path.iterdir()) == [text]


REFUSED: dict[str, tuple[ExportOptions, str]] = {
    "another size": (replace(INT4, block_size=24), "block size is 24; accepted: 16, 32, 64, 128, 256"),
    "standard flavor": (replace(INT4, onnx_flavor=None), "give --onnx-flavor ort"),
    "float16": (replace(INT4, dtype="float16"), "need float32"),
    "another format": (
        replace(INT4, format="pt2", onnx_flavor=None),
        "weights is int4, which format pt2 does not have",
    ),
    "size alone": (replace(SMALL, block_size=32), "block size needs quantised weights, but there are none"),
    "head alone": (replace(SMALL, quantise_head=True), "quantise head needs quantised weights"),
    "limit alone": (replace(SMALL, max_kl=0.1), "max kl needs quantised weights"),
    "negative limit": (replace(INT4, max_kl=-0.1), "max kl is -0.1; accepted: a number of nats, 0 or more"),
    "no share": (replace(INT4, min_agreement=99.0), "min agreement is 99.0; accepted: a share, 0 to 1"),
    "no text": (replace(INT4, text=Path("nowhere.txt")), "nowhere.txt cannot be read as text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantised_is_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        export_bundle(read_model(SAMPLE), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_a_limit_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    found = replace(read_model(SAMPLE), companions=())
    with pytest.raises(InputError, match=r"the checkpoint has no tokenizer\.json"):
        export_bundle(found, tmp_path / "bundle", replace(INT4, max_kl=0.1))


@pytest.mark.slow
def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("x")
    with pytest.raises(InputError, match="text has 1 tokens, too few for a loss"):
        export_bundle(read_model(SAMPLE), tmp_path / "bundle", replace(INT4, text=text), verify=False)


def test_a_block_is_refused(sample_block: Any, tmp_path: Path) -> None:
    options = replace(INT4, graph="plain")
    with pytest.raises(InputError, match="which only whole models have"):
        export_bundle(sample_block, tmp_path / "bundle", options)


@pytest.fixture
def sample_block() -> Any:
    from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint

    return read_checkpoint(SAMPLE, CheckpointOptions(layer=0))
