"""Calls of an eager block with tensors named as in its graph, and zero inputs of chosen sizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs.spec import GraphSpec

__all__ = ["run_graph", "zero_inputs"]


def run_graph(
    module: Any, inputs: Mapping[str, Any], *, last_only: bool = False, in_place: bool = False
) -> dict[str, Any]:
    """Call an eager block or model with inputs and outputs named as in its graph.

    Args:
        module: a `diffdeploy.modules.AttentionBlock` or `diffdeploy.modules.DiffTransformer`.
        inputs: tensors by the names of `GraphSpec.inputs`.
        last_only: true if a model returns only the logits of the last position.
        in_place: true if the caches of a model are buffers that the call updates.

    Returns:
        Tensors by the names of `GraphSpec.outputs`; the first ``T`` tokens of a cache that is updated in place.
    """
    names = [name for name in inputs if name.startswith("past_key_values.")]
    past = [(inputs[key], inputs[value]) for key, value in zip(names[::2], names[1::2], strict=True)]
    # A plain graph has no mask, and a graph without rotary embedding has no positions.
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    present = []
    if "input_ids" in inputs:
        output, present = module(inputs["input_ids"], mask, positions, past, last_only=last_only, in_place=in_place)
    elif past:
        output, cache = module(inputs["hidden_states"], mask, positions, past[0])
        present = [cache]
    else:
        output = module(inputs["hidden_states"], mask, positions)
    sides = [side for cache in present for side in cache]
    given = {name.replace("past_key_values.", "present."): side for name, side in zip(names, sides, strict=True)}
    return {"logits" if "input_ids" in inputs else "output": output, **given}


def zero_inputs(spec: GraphSpec, **sizes: int) -> dict[str, Array]:
    """Inputs of a graph, filled with zeros.

    Args:
        spec: interface of the graph.
        **sizes: sizes of axes by name; by default the smallest size of each axis, except the sequence length, which is
            64, or its maximum if that is less.
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
