"""Intermediate values of an ONNX model: every one becomes an output, and one at a time is asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.graphs import Stage

__all__ = ["intermediate_values", "what_is_shown"]


def what_is_shown(directory: Path) -> dict[str, Any]:
    """What the values of the graph are, for `Matcher`: onnxruntime's own operator takes each stream by itself."""
    import onnx

    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    own = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    turns = any(attribute.name == "do_rotary" and attribute.i for node in own for attribute in node.attribute)
    return {"by_stream": bool(own), "hidden": {Stage.ROPE} if turns else set()}


def intermediate_values(directory: Path, inputs: Mapping[str, Array]) -> Iterator[tuple[str, Tensor]]:
    """Name of the node and value of every floating-point result, in the order of the graph.

    Args:
        directory: of the bundle.
        inputs: by the names of the graph.
    """
    import onnx
    import onnxruntime

    path = directory / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    declared = {value.name for value in model.graph.output}
    nodes = {name: node for node in model.graph.node for name in node.output if name}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in declared)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what it would log it also raises
    # Weights in a file of their own are looked for beside the model.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    for value in session.get_outputs():
        if value.type in ("tensor(float)", "tensor(float16)", "tensor(bfloat16)"):
            (array,) = session.run([value.name], dict(inputs))
            node = nodes[value.name]
            yield f"{node.op_type} {node.name}", to_tensor(array)
