"""Calling an eager block by the names of a graph, and inputs of chosen sizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs.spec import GraphSpec

__all__ = ["run_block", "zero_inputs"]


def run_block(block: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Call an eager block by the names of a graph.

    Args:
        block: a `diffdeploy.modules.AttentionBlock`.
        inputs: tensors by the names of `GraphSpec.inputs`.

    Returns:
        Tensors by the names of `GraphSpec.outputs`.
    """
    past = None
    if "past_key_values.key" in inputs:
        past = (inputs["past_key_values.key"], inputs["past_key_values.value"])
    # A graph has no mask where it is plain, and no positions where nothing is turned.
    result = block(inputs["hidden_states"], inputs.get("attention_mask"), inputs.get("position_ids"), past)
    if past is None:
        return {"output": result}
    output, (key, value) = result
    return {"output": output, "present.key": key, "present.value": value}


def zero_inputs(spec: GraphSpec, **sizes: int) -> dict[str, Array]:
    """Inputs of a graph that hold zeros.

    Args:
        spec: interface of the graph.
        **sizes: sizes of axes by name; by default the smallest, and 64 positions, or as many as there can be.
    """
    axes = {name: bounds.min for name, bounds in spec.axes.items()}
    axes["sequence_length"] = min(64, spec.axes["sequence_length"].max)
    axes |= sizes
    for total, parts in spec.sums.items():
        axes[total] = sum(axes[part] for part in parts)
    return {
        name: np.zeros([axis if isinstance(axis, int) else axes[axis] for axis in tensor.shape], tensor.dtype)
        for name, tensor in spec.inputs.items()
    }
