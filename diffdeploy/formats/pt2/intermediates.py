"""Intermediate values of an exported program, seen while an interpreter runs it and lets them go."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Intermediates
from diffdeploy.formats.pt2.backend import load_program

__all__ = ["intermediates"]


def intermediates(directory: Path) -> Intermediates:
    """What can be seen of the program in a bundle: every stage, for both streams together."""
    return Intermediates(partial(_values, directory))


def _values(directory: Path, inputs: Mapping[str, Array]) -> Iterator[tuple[str, Tensor]]:
    """Name of the node and value of every tensor that the program computes, in the order of the graph.

    Args:
        directory: of the bundle.
        inputs: by the names of the graph, in its order.
    """
    try:
        module = load_program(directory).module()
    except Exception as error:
        raise ExportError(str(error)) from error
    assert isinstance(module, torch.fx.GraphModule)
    tensors = [to_tensor(array) for array in inputs.values()]
    interpreter = torch.fx.Interpreter(module)
    # What `run` would set, which gives nothing but the outputs.
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
                # Held no longer than the program needs it, as when it runs by itself.
                del interpreter.env[done]
            if node.op == "call_function" and isinstance(value, Tensor):
                yield f"{node.target} {node.name}", value


def _last_uses(module: torch.fx.GraphModule) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """By node, the values that nothing needs after it."""
    seen: set[torch.fx.Node] = set()
    last: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(module.graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last
