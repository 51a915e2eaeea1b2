"""Faults in the ONNX file that a careless export or a later tool may introduce."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.bundle import Manifest
from diffdeploy.formats.artifact import FileFault
from diffdeploy.formats.onnx.external import load_model, remove_external_data
from diffdeploy.formats.onnx.names import EXTERNAL_DATA, MODEL, is_external_data

if TYPE_CHECKING:
    import onnx

__all__ = ["ONNX_FAULTS"]


def _fault(name: str, breaks: str, edit: "Callable[[onnx.ModelProto], None]") -> FileFault:
    def edit_file(directory: Path) -> None:
        import onnx

        model = load_model(directory)
        edit(model)
        remove_external_data(directory)
        onnx.save(model, directory / MODEL)

    return FileFault(name=name, breaks=breaks, edit=edit_file)


def _stale_external_data(directory: Path) -> None:
    """Leave the external weights of an earlier export next to a newer model."""
    import onnx

    model = load_model(directory)
    # Every tensor with more than a few dozen numbers is moved to the file, including the weights.
    onnx.save(model, directory / MODEL, save_as_external_data=True, location=EXTERNAL_DATA, size_threshold=256)
    data = np.fromfile(directory / EXTERNAL_DATA, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # blocks of quantised weights are no floats
        data = np.where(np.isfinite(data), data * np.float32(1.01), data)
    data.astype(np.float32).tofile(directory / EXTERNAL_DATA)


def _inline_float32(manifest: Manifest) -> bool:
    return manifest.graph.dtype == "float32" and not any(map(is_external_data, manifest.files))


def _fix_the_batch(model: "onnx.ModelProto") -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def _freeze_the_batch_inside(model: "onnx.ModelProto") -> None:
    """Replace the size of the batch, which the first ``Shape`` node of each input reads, with 2 inside the graph."""
    import onnx

    for node in model.graph.node:
        span = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Shape" and (span.get("start", 0), span.get("end")) == (0, 1):
            # The node that read the size from the input now returns a constant.
            node.op_type = "Identity"
            del node.attribute[:]
            node.input[0] = "frozen_batch"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "frozen_batch"))


def _add_a_softmax(model: "onnx.ModelProto") -> None:
    import onnx

    last = model.graph.output[0].name
    node = next(node for node in model.graph.node if last in node.output)
    node.output[list(node.output).index(last)] = "before_softmax"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["before_softmax"], [last]))


def _add_a_foldable_node(model: "onnx.ModelProto") -> None:
    import onnx

    constant = next(t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    model.graph.node.insert(0, onnx.helper.make_node("Neg", [constant], ["negative"]))


def _leave_an_unused_constant(model: "onnx.ModelProto") -> None:
    import onnx

    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "left_over"))


def _leak_a_path(model: "onnx.ModelProto") -> None:
    model.graph.node[0].doc_string = "/home/someone/model.py"


def _name_a_node_after_a_path(model: "onnx.ModelProto") -> None:
    model.graph.node[0].name = "/home/someone/Shape"


def _raise_the_opset(model: "onnx.ModelProto") -> None:
    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    entry.version += 1


def _import_another_domain(model: "onnx.ModelProto") -> None:
    import onnx

    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def _rename_the_output(model: "onnx.ModelProto") -> None:
    last = model.graph.output[0]
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == last.name:
                node.output[index] = "result"
    last.name = "result"


def _break_the_types(model: "onnx.ModelProto") -> None:
    # `And` has as many inputs as `Sub`, but accepts only booleans.
    next(node for node in model.graph.node if node.op_type == "Sub").op_type = "And"


def _exchange_operands(model: "onnx.ModelProto") -> None:
    # The last subtraction is the difference of the streams; earlier ones belong to the rotary embedding.
    node = [node for node in model.graph.node if node.op_type == "Sub"][-1]
    node.input[0], node.input[1] = node.input[1], node.input[0]


ONNX_FAULTS = [
    _fault("onnx_batch_axis_fixed", "the declared batch is 2", _fix_the_batch),
    _fault("onnx_batch_frozen_inside", "shapes inside the graph assume a batch of 2", _freeze_the_batch_inside),
    _fault("onnx_third_softmax", "a softmax after the output", _add_a_softmax),
    _fault("onnx_foldable_node", "a node that does not depend on the input", _add_a_foldable_node),
    _fault("onnx_unused_constant", "a constant that nothing reads", _leave_an_unused_constant),
    _fault("onnx_path_in_a_doc_string", "a path of the exporting machine", _leak_a_path),
    _fault("onnx_path_in_a_node_name", "a path of the exporting machine", _name_a_node_after_a_path),
    _fault("onnx_another_opset", "the opset is not the manifest's", _raise_the_opset),
    _fault("onnx_another_domain", "operators that not every runtime has", _import_another_domain),
    _fault("onnx_output_renamed", "the output has another name", _rename_the_output),
    _fault("onnx_does_not_load", "a node of the wrong type", _break_the_types),
    _fault("onnx_operands_exchanged", "the last subtraction the other way round", _exchange_operands),
    FileFault(
        name="onnx_stale_external_data",
        place="bundle",
        breaks="weights in a file of an earlier export",
        edit=_stale_external_data,
        applies=_inline_float32,
    ),
]
