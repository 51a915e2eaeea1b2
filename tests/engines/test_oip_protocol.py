"""Requests of the Open Inference Protocol as JSON brings them, answered without a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import diffdeploy
from diffdeploy.checkpoints import Checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.engines.oip import Served, WireTensor
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions
from diffdeploy.runtime import Runtime
from tests.support.bundles import SMALL_MODEL, BundleCache


@pytest.fixture(scope="module")
def block(sample_bundle: Path) -> Iterator[Runtime]:
    with diffdeploy.load(sample_bundle) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def model_bundle(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), SMALL_MODEL)


@pytest.fixture(scope="module")
def model(model_bundle: Path) -> Iterator[Runtime]:
    with diffdeploy.load(model_bundle) as runtime:
        yield runtime


def wire(name: str, data: Any, shape: list[int], datatype: str = "FP32") -> WireTensor:
    """As it looks when it came through JSON."""
    return WireTensor(name=name, datatype=datatype, shape=shape, data=json.loads(json.dumps(data)))


def hidden(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_block_answers_what_its_runtime_does_bit_for_bit(block: Runtime) -> None:
    served = Served(block)
    states = hidden(2, 7, 128)
    expected = block(hidden_states=states)["output"]
    for data in (states.tolist(), states.reshape(-1).tolist()):
        found = served.answer([wire("hidden_states", data, [2, 7, 128])])
        assert list(found) == ["output"]
        through = np.array(json.loads(json.dumps(found["output"].tolist())), np.float32)
        assert through.tobytes() == expected.tobytes()


def test_metadata_is_that_of_the_graph(block: Runtime, model: Runtime) -> None:
    assert Served(block).inputs == (("hidden_states", "FP32", (-1, -1, 128)),)
    assert Served(block).outputs == (("output", "FP32", (-1, -1, 128)),)
    assert Served(block).platform == "diffdeploy_onnx"
    served = {tensor.name: tensor for tensor in Served(model).inputs}
    assert served["input_ids"] == ("input_ids", "INT64", (-1, -1))
    assert served["past_key_values.3.value"] == ("past_key_values.3.value", "FP32", (-1, 2, -1, 32))
    assert {tensor.name for tensor in Served(model).outputs} >= {"logits", "present.0.key"}


def test_a_model_runs_its_graph(model: Runtime) -> None:
    inputs: dict[str, Any] = {
        "input_ids": np.array([[5, 6, 7]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": np.arange(3)[None],
    }
    inputs |= {name: np.zeros((1, 2, 0, 32), np.float32) for name in model.spec.caches}
    given = [
        wire(name, array.tolist(), list(array.shape), "INT64" if array.dtype == np.int64 else "FP32")
        for name, array in inputs.items()
    ]
    expected = model(**inputs)
    # Of the transport, and so nothing that a model could be asked for.
    parameters = {"content_type": "np", "headers": {"host": "localhost"}, "binary_data_output": False}
    found = Served(model).answer(given, parameters, ["present.1.key", "logits"])
    assert list(found) == ["present.1.key", "logits"]
    for name, array in found.items():
        assert array.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "do_sample": True, "seed": 3, "temperature": 2, "top_k": 20},
        {"max_new_tokens": 9, "eos_token_id": 32, "pad_token_id": 1, "min_new_tokens": 2},
    ],
    ids=["greedy", "drawn", "ended"],
)
def test_tokens_are_those_of_generate(model: Runtime, options: dict[str, Any]) -> None:
    ids, mask = np.array([[0, 100, 101], [100, 101, 102]]), np.array([[0, 1, 1], [1, 1, 1]])
    expected = model.generate(ids, mask, **options)
    given = [wire("input_ids", ids.tolist(), [2, 3], "INT64"), wire("attention_mask", mask.tolist(), [2, 3], "INT64")]
    found = Served(model).answer(given, options)
    np.testing.assert_array_equal(found["output_ids"], expected)
    assert list(found) == ["output_ids", "text"]
    # Without a mask there is no padding.
    found = Served(model).answer([wire("input_ids", [100, 101], [1, 2], "INT64")], options)
    np.testing.assert_array_equal(found["output_ids"], model.generate(ids[:1, 1:], **options))


def test_texts_of_several_lengths_are_what_each_gets_alone(model: Runtime) -> None:
    texts = ["def main(argv", "import "]
    options: dict[str, Any] = {"max_new_tokens": 11, "stop": "\n"}
    found = Served(model).answer([wire("text", texts, [2], "BYTES")], options)
    for row, text in enumerate(texts):
        ids = np.array([model.tokenizer.encode(text)])
        alone = "".join(step.texts[0] for step in model.stream(ids, **options) if step.texts)
        assert found["text"][row] == alone
    assert found["output_ids"].shape == (2, len(texts[0].encode()) + 11)


IDS = wire("input_ids", [1, 2], [1, 2], "INT64")
NEW = {"max_new_tokens": 3}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (wire("hidden", [0.0], [1, 1, 1]), r"inputs are \['hidden'\]; accepted: \['hidden_states'\]"),
        (wire("hidden_states", [0.0], [1, 1, 128]), r"hidden_states has 1 elements, but its shape is \[1, 1, 128\]"),
        (wire("hidden_states", [0.0] * 128, [1, -1, 128]), "accepted: sizes of 0 or more"),
        (wire("hidden_states", [0.0] * 64, [1, 1, 64]), r"has shape \[1, 1, 64\]; accepted:"),
        (wire("hidden_states", [0.0] * 128, [128]), r"has shape \[128\]; accepted:"),
        (wire("hidden_states", [1] * 128, [1, 1, 128], "INT64"), "has datatype INT64; accepted: FP32"),
        (wire("hidden_states", [0.0] * 128, [1, 1, 128], "BF16"), "has datatype BF16; accepted: FP32"),
        (wire("hidden_states", ["1.5"] * 128, [1, 1, 128]), "has an element that is not FP32"),
        (wire("hidden_states", [None] * 128, [1, 1, 128]), "has an element that is not FP32"),
        (wire("hidden_states", [True] * 128, [1, 1, 128]), "has an element that is not FP32"),
        (wire("hidden_states", [1e300] * 128, [1, 1, 128]), "has an element that is not FP32"),
        (wire("hidden_states", [[1.0], [1.0, 2.0]], [1, 1, 3]), "rows of different lengths"),
        (wire("hidden_states", [0.0] * 257 * 128, [1, 257, 128]), "sequence_length of hidden_states is 257"),
        (wire("hidden_states", [], [0, 1, 128]), "batch_size of hidden_states is 0"),
    ],
)
def test_a_wrong_tensor_is_refused(block: Runtime, tensor: WireTensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Served(block).answer([tensor])


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([IDS, IDS], NEW, "each may be given once"),
        ([IDS], {}, "inputs are .'input_ids'.; accepted:"),
        ([wire("text", ["a"], [1], "BYTES")], {}, "parameter max_new_tokens is not accepted: Field required"),
        ([IDS, wire("text", ["a"], [1], "BYTES")], NEW, "accepted: text, or input_ids with or without"),
        ([wire("text", ["a"], [2], "BYTES")], NEW, r"text has shape \[2\] and 1 texts"),
        ([wire("text", ["a"], [1], "FP32")], NEW, "text has datatype FP32; accepted: BYTES"),
        ([wire("text", [7], [1], "BYTES")], NEW, "accepted: BYTES, a list of texts"),
        ([wire("text", ["a", ""], [2], "BYTES")], NEW, "text 1 has no tokens"),
        ([wire("text", [], [0], "BYTES")], NEW, "the prompt is empty"),
        ([wire("input_ids", [1.5, 2], [1, 2], "INT64")], NEW, "has an element that is not INT64"),
        ([wire("input_ids", [2**63, 2**63], [1, 2], "INT64")], NEW, "has an element that is not INT64"),
        ([wire("input_ids", [2**70, 2], [1, 2], "INT64")], NEW, "has an element that is not INT64"),
        ([wire("input_ids", [1, 999], [1, 2], "INT64")], NEW, "input_ids holds numbers from 1 to 999"),
        ([wire("input_ids", [1, 2], [2], "INT64")], NEW, r"input_ids is int64 \[2\]"),
        ([wire("input_ids", [1] * 5, [5, 1], "INT64")], NEW, "batch_size is 5; accepted: 1 to 4"),
        ([IDS], {"max_new_tokens": 400}, "the bundle was exported for 48"),
        ([IDS], {"max_new_tokens": "3"}, "parameter max_new_tokens is not accepted: Input should be a valid integer"),
        ([IDS], {**NEW, "temperatur": 1}, "parameter temperatur is not accepted: Extra inputs are not permitted"),
        ([IDS], {**NEW, "temperature": "hot"}, "parameter temperature is not accepted"),
        ([IDS], {**NEW, "do_sample": 1}, "parameter do_sample is not accepted"),
        ([IDS], {**NEW, "top_p": 7.0}, "top_p is 7.0; accepted: above 0"),
        ([IDS, wire("attention_mask", [1, 0], [1, 2], "INT64")], NEW, "attention_mask ends in padding"),
    ],
)
def test_a_wrong_prompt_is_refused(
    model: Runtime, inputs: list[WireTensor], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Served(model).answer(inputs, parameters)


def test_an_output_that_is_not_there(model: Runtime) -> None:
    with pytest.raises(InputError, match="output 'logits' is requested; accepted: output_ids, text"):
        Served(model).answer([IDS], NEW, ["text", "logits"])


def test_a_block_does_not_generate(block: Runtime) -> None:
    with pytest.raises(InputError, match=r"inputs are \['input_ids'\]; accepted: \['hidden_states'\]"):
        Served(block).answer([IDS], NEW)


def test_bfloat16_is_refused(block: Runtime) -> None:
    spec = block.spec.model_copy(
        update={"outputs": {"output": block.spec.outputs["output"].model_copy(update={"dtype": "bfloat16"})}}
    )
    runtime: Any = SimpleNamespace(spec=spec, bundle=block.bundle)
    with pytest.raises(InputError, match="is in bfloat16, which the Open Inference Protocol cannot represent"):
        Served(runtime)


def test_half_precision(sample: Checkpoint, bundles: BundleCache) -> None:
    path = bundles.bundle(sample, ExportOptions(dtype="float16", max_sequence_length=64, cases="quick"))
    with diffdeploy.load(path) as runtime:
        served = Served(runtime)
        states = hidden(1, 3, 128).astype(np.float16)
        tensor = wire("hidden_states", states.tolist(), [1, 3, 128], "FP16")
        expected = runtime(hidden_states=states)["output"]
        assert served.answer([tensor])["output"].tobytes() == expected.tobytes()
        with pytest.raises(InputError, match="has an element that is not FP16"):
            served.answer([wire("hidden_states", [7e4] * 128, [1, 1, 128], "FP16")])
