"""Intermediate values of an exported program, observed while an interpreter runs it."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Intermediates, LayerValues
from diffdeploy.formats.in_place import buffers_of, caches_of
from diffdeploy.formats.pt2.backend import load_program
from diffdeploy.graphs import GraphSpec

__all__ = ["intermediates", "layer_values"]

# Path of a layer's module in the exported model.
_LAYER = re.compile(r"block\.layers\.(\d+)")


def intermediates(directory: Path, spec: GraphSpec) -> Intermediates:
    """Intermediate values of the program in a bundle: every stage, for both streams together."""
    return Intermediates(partial(_values, directory, spec))


def _values(directory: Path, spec: GraphSpec, inputs: Mapping[str, Array]) -> Iterator[tuple[str, Tensor]]:
    """Name of the node and value of every tensor that the program computes, in the order of the graph.

    Args:
        directory: directory of the bundle.
        spec: interface of the graph.
        inputs: inputs by the names of the graph, in its order.
    """
    tensors = buffers_of(spec, [to_tensor(array) for array in inputs.values()])
    for node, value in _run(_module(directory), tensors):
        if node.op == "call_function" and isinstance(value, Tensor):
            yield f"{node.target} {node.name}", value


def layer_values(directory: Path, num_layers: int, spec: GraphSpec) -> LayerValues:
    """Function that computes a model's outputs and those of its layers, the last result of each layer's module."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        module = _module(directory)
        layers = _last_of_layers(module)
        if len(layers) != num_layers:
            raise ExportError(f"the program has {len(layers)} layer modules, but the model has {num_layers}")
        tensors = buffers_of(spec, [to_tensor(array) for array in inputs.values()])
        found = {}
        for node, value in _run(module, tensors):
            if node in layers:
                found[f"layers.{layers[node]}.output"] = to_array(value)
            elif node.op == "output":
                given = caches_of(spec, tensors, value)
                found |= {name: to_array(tensor) for name, tensor in zip(spec.outputs, given, strict=True)}
        return found

    return run


def _last_of_layers(module: torch.fx.GraphModule) -> dict[torch.fx.Node, int]:
    last: dict[int, torch.fx.Node] = {}
    for node in module.graph.nodes:
        # Paths of the traced modules from the outermost inwards, with their classes.
        for path, *_ in node.meta.get("nn_module_stack", {}).values():
            if node.op == "call_function" and (layer := _LAYER.fullmatch(path)):
                last[int(layer[1])] = node
    return {node: number for number, node in last.items()}


def _module(directory: Path) -> torch.fx.GraphModule:
    try:
        module = load_program(directory).module()
    except Exception as error:
        raise ExportError(str(error)) from error
    assert isinstance(module, torch.fx.GraphModule)
    return module


def _run(module: torch.fx.GraphModule, tensors: list[Tensor]) -> Iterator[tuple[torch.fx.Node, Any]]:
    """Run every node and yield it with its result."""
    interpreter = torch.fx.Interpreter(module)
    # `Interpreter.run` would set this, but it returns only the outputs.
    interpreter.args_iter = iter(tensors)
    last_use = _last_uses(module)
    with torch.no_grad():
        for node in module.graph.nodes:
            try:
                value: Any = interpreter.run_node(node)
            except Exception as error:
                raise ExportError(str(error)) from error
            interpreter.env[node] = value
            for done in last_use.get(node, ()):
                # Released after its last use, as when the program runs on its own.
                del interpreter.env[done]
            yield node, value


def _last_uses(module: torch.fx.GraphModule) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Values that are not needed after each node."""
    seen: set[torch.fx.Node] = set()
    last: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(module.graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last
