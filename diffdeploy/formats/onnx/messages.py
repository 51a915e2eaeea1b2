"""All fields of an ONNX model that are set; those that no export sets would otherwise escape the contract."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

__all__ = ["strings", "unwritten"]

# Notes that tools leave for people, and that an export removes.
_NOTES = ("doc_string", "metadata_props")

# Fields that an export sets, by message. Subgraphs, functions, sparse weights and training are not among them.
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
    """Fields that are set although no export sets them, each with the message that contains it.

    Returns:
        Doc strings and metadata, and all other fields.
    """
    notes: list[str] = []
    others: list[str] = []
    for message, field, _ in _fields(model):
        kind = message.DESCRIPTOR.name
        if field not in _WRITTEN[kind]:
            owner = f"{kind.removesuffix('Proto')} {getattr(message, 'name', '')}".rstrip()
            (notes if field in _NOTES else others).append(f"{owner} has {field}")
    # Unknown fields cannot be listed; without them, the serialised model is shorter.
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        others.append("there are fields that the installed onnx does not know")
    return notes, others


def strings(model: "onnx.ModelProto") -> Iterator[str]:
    """Every string in the fields that an export sets."""
    for message, field, values in _fields(model):
        if field in _WRITTEN[message.DESCRIPTOR.name] - {"raw_data"}:
            yield from (text for text in values if isinstance(text, str))
            yield from (text.decode(errors="replace") for text in values if isinstance(text, bytes))


def _fields(message: Any) -> Iterator[tuple[Any, str, list[Any]]]:
    """Fields of a message and of the messages inside it, with their values; unexpected fields are not searched."""
    for field, value in message.ListFields():
        values = list(value) if hasattr(value, "extend") else [value]
        yield message, field.name, values
        if field.message_type is not None and field.name in _WRITTEN[message.DESCRIPTOR.name]:
            for each in values:
                yield from _fields(each)
