"""Intermediate values of an ONNX model: each becomes an output, and they are requested one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Intermediates, LayerValues
from diffdeploy.formats.onnx.external import load_model
from diffdeploy.formats.onnx.names import ORT_ATTENTION, layer_output
from diffdeploy.graphs import Stage

__all__ = ["intermediates", "layer_values", "session_settings"]

_FLOATING = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")


def intermediates(directory: Path) -> Intermediates:
    """Intermediate values of the model in a bundle; onnxruntime's own operator computes each stream separately."""
    try:
        graph = load_model(directory, weights=False).graph
    except Exception as error:
        raise ExportError(str(error)) from error
    own = [node for node in graph.node if node.op_type == ORT_ATTENTION]
    # The rotary embedding inside the operator is not a value of the graph.
    turns = any(attribute.name == "do_rotary" and attribute.i for node in own for attribute in node.attribute)
    return Intermediates(
        partial(_values, directory), by_stream=bool(own), hidden=frozenset({Stage.ROPE} if turns else ())
    )


def _values(directory: Path, inputs: Mapping[str, Array]) -> Iterator[tuple[str, Tensor]]:
    """Name of the node and value of every floating-point result, in the order of the graph.

    Args:
        directory: directory of the bundle.
        inputs: inputs by the names of the graph.
    """
    import onnx
    import onnxruntime

    model = load_model(directory, weights=False)
    declared = {value.name for value in model.graph.output}
    nodes = {name: node for node in model.graph.node for name in node.output if name}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in declared)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_settings(directory), providers=["CPUExecutionProvider"]
        )
        shown = [value.name for value in session.get_outputs() if value.type in _FLOATING]
    except Exception as error:
        raise ExportError(str(error)) from error
    # The graph runs again for each value, since otherwise all of them would be in memory at the same time.
    for name in shown:
        try:
            (array,) = session.run([name], dict(inputs))
        except Exception as error:
            raise ExportError(str(error)) from error
        node = nodes[name]
        yield f"{node.op_type} {node.name}", to_tensor(array)


def layer_values(directory: Path, num_layers: int, outputs: Sequence[str]) -> LayerValues:
    """Function that computes a model's outputs and those of its layers."""
    names = [*outputs, *map(layer_output, range(num_layers))]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        import onnx
        import onnxruntime

        try:
            model = load_model(directory, weights=False)
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), session_settings(directory), providers=["CPUExecutionProvider"]
            )
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as error:
            raise ExportError(str(error)) from error

    return run


def session_settings(directory: Path) -> Any:
    """Options of a session for a changed model, with the weights in a directory."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # everything that it would log is also raised
    settings.enable_cpu_mem_arena = False  # the verification needs the memory that an arena would keep
    # onnxruntime looks for external weights in this folder.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return settings
