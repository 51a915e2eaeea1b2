"""Constants of an exported program: its state, its buffers, and the numbers among the arguments of its nodes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdeploy.arrays import Array, to_tensor
from diffdeploy.formats.pt2.backend import MODEL, load_program

__all__ = ["read", "save", "write"]

# Names that the exporter gives to these constants, after the path of the block's module.
_BUFFERS = {"lambda": "block._frozen_lambda", "rope.cos": "block.rotary.cos", "rope.sin": "block.rotary.sin"}
_ARGUMENTS = {"norm_eps": "rms_norm", "output_scale": "mul", "softmax_scale": "scaled_dot_product_attention"}


def save(program: torch.export.ExportedProgram, directory: Path) -> None:
    """Replace the program of the bundle."""
    torch.export.save(program, directory / MODEL)


def read(directory: Path, expected: Mapping[str, Array]) -> set[str]:
    """Names of the expected constants that the program contains."""
    program = load_program(directory)
    arguments = {name for name in expected if _kind(name) and list(_nodes(program, name, expected[name]))}
    return {name for name in expected if _tensor(program, name) is not None} | arguments


def write(directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
    """Replace constants and save the program."""
    program = load_program(directory)
    for name, array in changes.items():
        if _kind(name):
            for node in _nodes(program, name, expected[name]):
                _replace(node, float(expected[name]), float(array))
            continue
        key, holder = _holder(program, name)
        old = holder[key]
        new = to_tensor(np.ascontiguousarray(array)).to(old.dtype).reshape(old.shape)
        holder[key] = torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new
    save(program, directory)


def _kind(name: str) -> str | None:
    """Kind of calls in which a number is an argument; ``None`` for constants that are not arguments."""
    return _ARGUMENTS.get(name.rpartition("self_attn.")[2])


def _holder(program: torch.export.ExportedProgram, name: str) -> tuple[str, dict[str, Any]]:
    # The constants of a layer have its prefix.
    layer, dot, own = name.rpartition("self_attn.")
    key = _BUFFERS.get(own, f"block.{own}").replace("block.", f"block.{layer}{dot}", 1)
    return key, program.state_dict if key in program.state_dict else program.constants


def _tensor(program: torch.export.ExportedProgram, name: str) -> torch.Tensor | None:
    key, holder = _holder(program, name)
    return holder.get(key)


def _nodes(program: torch.export.ExportedProgram, name: str, value: Array) -> Iterator[torch.fx.Node]:
    """Nodes with the number as an argument."""
    for node in program.graph.nodes:
        arguments = (*node.args, *node.kwargs.values())
        if str(_kind(name)) in str(node.target) and any(_is(argument, float(value)) for argument in arguments):
            yield node


def _is(argument: Any, value: float) -> bool:
    # Compared exactly, since a program stores its numbers as Python floats, without rounding.
    return isinstance(argument, float) and argument == value


def _replace(node: torch.fx.Node, old: float, new: float) -> None:
    node.args = tuple(new if _is(argument, old) else argument for argument in node.args)
    node.kwargs = {key: new if _is(argument, old) else argument for key, argument in node.kwargs.items()}
