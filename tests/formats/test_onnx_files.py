"""Weights of ONNX models in files of their own: only the file that an export writes is ever opened."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from diffdeploy import load
from diffdeploy.cli.main import main
from diffdeploy.errors import IntegrityError
from diffdeploy.formats.onnx.external import _INSIDE, require_own_data
from tests.support.bundles import FormatBundle
from tests.support.manifests import accept, signed

ELSEWHERE = [
    "../elsewhere",
    "/etc/hostname",
    "weights.safetensors",
    "folder/../model.onnx.data",
    "*/_ORT_MEM_ADDR_/*",
    "",
]


@pytest.fixture
def with_data(format_bundle: FormatBundle, tmp_path: Path) -> Path:
    """A bundle whose weights are in a file beside the model."""
    bundle = tmp_path / "bundle"
    shutil.copytree(format_bundle("onnx"), bundle)
    onnx.save(
        onnx.load(bundle / "model.onnx"), bundle / "model.onnx", save_as_external_data=True, location="model.onnx.data"
    )
    return accept(signed(bundle))


def opened(*_: object, **__: object) -> None:
    pytest.fail("the model was opened")


def led_to(bundle: Path, location: str) -> Path:
    """The bundle with the last of its tensors in another file."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    entries = [e for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    entries[-1].value = location
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    return accept(signed(bundle))


def test_the_file_of_an_export_is_read(with_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(with_data), "--cases", "1"]) == 0
    assert main(["verify", str(with_data), "--golden"]) == 0


@pytest.mark.parametrize("location", ELSEWHERE)
def test_no_other_file_is(
    location: str, with_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(with_data / "model.onnx.data", with_data.parent / "elsewhere")
    led_to(with_data, location)
    # Neither library gets to see the model.
    monkeypatch.setattr(onnx, "load", opened)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    with pytest.raises(IntegrityError, match="is not loaded: it reads weights from"):
        load(with_data)
    for command in (["--cases", "1"], ["--golden"], ["--runtime", "reference"], ["--self-test"]):
        assert main(["verify", str(with_data), *command]) == 5, command
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert repr(location) in said[0]


def test_a_link_is_no_file_of_an_export(with_data: Path) -> None:
    (with_data / "model.onnx.data").rename(with_data.parent / "elsewhere")
    (with_data / "model.onnx.data").symlink_to(with_data.parent / "elsewhere")
    with pytest.raises(IntegrityError, match="is a link"):
        load(with_data)


def outside(name: str = "x") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.onnx.data")
    tensor.external_data.add(key="location", value="../elsewhere")
    return tensor


def in_subgraph(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node[3].attribute.add(name="body").g.initializer.append(tensor)


def in_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.functions.add().node.add().attribute.add(name="value").t.CopyFrom(tensor)


HIDDEN: dict[str, Callable[[onnx.ModelProto, onnx.TensorProto], Any]] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "attribute": lambda model, tensor: model.graph.node[0].attribute.add(name="value").t.CopyFrom(tensor),
    "tensors": lambda model, tensor: model.graph.node[0].attribute.add(name="values").tensors.append(tensor),
    "sparse": lambda model, tensor: model.graph.sparse_initializer.add().values.CopyFrom(tensor),
    "sparse attribute": lambda model, tensor: (
        model.graph.node[0].attribute.add().sparse_tensor.indices.CopyFrom(tensor)
    ),
    "subgraph": in_subgraph,
    "graphs": lambda model, tensor: model.graph.node[0].attribute.add().graphs.add().initializer.append(tensor),
    "function": in_function,
    "default": lambda model, tensor: model.functions.add().attribute_proto.add().t.CopyFrom(tensor),
    "training": lambda model, tensor: model.training_info.add().algorithm.initializer.append(tensor),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_names_of_files_are_found_wherever_a_tensor_may_be(place: str, with_data: Path) -> None:
    model = onnx.load(with_data / "model.onnx", load_external_data=False)
    HIDDEN[place](model, outside())
    (with_data / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=r"from '\.\./elsewhere'"):
        require_own_data(with_data)


def test_every_message_that_may_hold_a_tensor_is_followed() -> None:
    """The table against the description of the format that onnx brings."""
    names = {
        "model": "ModelProto",
        "training": "TrainingInfoProto",
        "function": "FunctionProto",
        "graph": "GraphProto",
        "node": "NodeProto",
        "attribute": "AttributeProto",
        "sparse": "SparseTensorProto",
        "tensor": "TensorProto",
        "entry": "StringStringEntryProto",
    }
    kept = {name: short for short, name in names.items()}
    for short, name in names.items():
        fields = getattr(onnx, name).DESCRIPTOR.fields
        held = {field.number: kept.get(field.message_type.name) for field in fields if field.message_type is not None}
        expected = {number: kind for number, kind in held.items() if kind not in (None, "entry")}
        if short == "tensor":
            expected = {onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER: "entry"}
        assert _INSIDE.get(short, {}) == expected


def test_an_entry_whose_name_is_there_twice(with_data: Path) -> None:
    """Readers take the last one."""
    content = (with_data / "model.onnx").read_bytes()
    entry = b"\x0a\x08location\x12\x0fmodel.onnx.data"
    twice = entry + b"\x12\x04../x"
    assert bytes([0x6A, len(entry)]) + entry in content
    for changed in (twice, b"\x0a\x08location\x12\x04../x", b"\x12\x04../x\x0a\x88\x00location"):
        tensor = bytes([0x6A, len(changed)]) + changed
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        # One more graph in the file is merged into the one before.
        (with_data / "model.onnx").write_bytes(content + b"\x3a" + bytes([len(graph)]) + graph)
        with pytest.raises(IntegrityError, match=r"from '\.\./x'"):
            require_own_data(with_data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x3a\x05\x01", "ends after"),
        (b"\x3a\xff\xff\xff\xff\xff\xff", "does not end"),
        (b"\x0b\x0c", "wire type"),
        (b"\x08", "does not end"),
        (b"\x0d\x00", "ends after"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(content: bytes, message: str, with_data: Path) -> None:
    (with_data / "model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        require_own_data(with_data)
    assert main(["run", str(accept(signed(with_data))), "-i", "x.npz", "-o", "y.npz"]) in (2, 4)
