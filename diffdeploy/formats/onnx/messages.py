"""All that stands in an ONNX model, and what of it no export writes: what nobody reads would escape the contract."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

__all__ = ["strings", "unwritten"]

# What tools leave behind for people, of which an export is cleared.
_NOTES = ("doc_string", "metadata_props")

# Fields that an export fills, by message. Not among them are subgraphs, functions, sparse weights and training.
_WRITTEN = {
    "ModelProto": {"ir_version", "producer_name", "producer_version", "graph", "opset_import"},
    "OperatorSetIdProto": {"domain", "version"},
    "GraphProto": {"name", "node", "initializer", "input", "output", "value_info"},
    "NodeProto": {"name", "domain", "op_type", "input", "output", "attribute"},
    "AttributeProto": {"name", "type", "i", "ints", "f", "floats", "s", "strings", "t"},
    "TensorProto": {"name", "data_type", "dims", "raw_data", "data_location", "external_data"},
    "StringStringEntryProto": {"key", "value"},
    "ValueInfoProto": {"name", "type"},
    "TypeProto": {"tensor_type"},
    "Tensor": {"elem_type", "shape"},
    "TensorShapeProto": {"dim"},
    "Dimension": {"dim_value", "dim_param"},
}


def unwritten(model: "onnx.ModelProto") -> tuple[list[str], list[str]]:
    """Fields that are filled and that no export fills, each with the message that it is in.

    Returns:
        Doc strings and metadata, and all others.
    """
    notes: list[str] = []
    others: list[str] = []
    for message, field, _ in _fields(model):
        kind = message.DESCRIPTOR.name
        if field not in _WRITTEN[kind]:
            owner = f"{kind.removesuffix('Proto')} {getattr(message, 'name', '')}".rstrip()
            (notes if field in _NOTES else others).append(f"{owner} has {field}")
    # Nothing says what they are; without them the model is shorter.
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        others.append("there are fields that the installed onnx does not know")
    return notes, others


def strings(model: "onnx.ModelProto") -> Iterator[str]:
    """Every text in the fields that an export fills."""
    for message, field, values in _fields(model):
        if field in _WRITTEN[message.DESCRIPTOR.name] - {"raw_data"}:
            yield from (text for text in values if isinstance(text, str))
            yield from (text.decode(errors="replace") for text in values if isinstance(text, bytes))


def _fields(message: Any) -> Iterator[tuple[Any, str, list[Any]]]:
    """Fields of a message and of those in it, with their values; what no export fills is not looked into."""
    for field, value in message.ListFields():
        values = list(value) if hasattr(value, "extend") else [value]
        yield message, field.name, values
        if field.message_type is not None and field.name in _WRITTEN[message.DESCRIPTOR.name]:
            for each in values:
                yield from _fields(each)
