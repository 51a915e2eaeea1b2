"""Calling an eager block by the names of a graph, and inputs of chosen sizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs.spec import GraphSpec

__all__ = ["run_graph", "zero_inputs"]


def run_graph(
    module: Any, inputs: Mapping[str, Any], *, last_only: bool = False, in_place: bool = False
) -> dict[str, Any]:
    """Call an eager block or model by the names of its graph.

    Args:
        module: a `diffdeploy.modules.AttentionBlock` or `diffdeploy.modules.DiffTransformer`.
        inputs: tensors by the names of `GraphSpec.inputs`.
        last_only: whether a model gives the logits of the last position alone.
        in_place: whether the caches of a model are buffers that the call writes into.

    Returns:
        Tensors by the names of `GraphSpec.outputs`; of a cache in place, its first ``T`` tokens.
    """
    names = [name for name in inputs if name.startswith("past_key_values.")]
    past = [(inputs[key], inputs[value]) for key, value in zip(names[::2], names[1::2], strict=True)]
    # A graph has no mask where it is plain, and no positions where nothing is turned.
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
