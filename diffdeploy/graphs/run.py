"""Calling an eager block by the names of a graph."""

from collections.abc import Mapping
from typing import Any

__all__ = ["run_block"]


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
    result = block(inputs["hidden_states"], inputs.get("attention_mask"), inputs.get("position_ids"), past)
    if past is None:
        return {"output": result}
    output, (key, value) = result
    return {"output": output, "present.key": key, "present.value": value}
