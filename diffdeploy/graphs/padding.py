"""Outputs at padded positions: arbitrary in most graphs, missing in those that count the tokens of a row."""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs.spec import GraphSpec

__all__ = ["clear_padding"]


def clear_padding(spec: GraphSpec, inputs: Mapping[str, Array], name: str, output: Array) -> None:
    """Set an output at padded positions to 0 if the graph counts tokens; otherwise leave it unchanged.

    Args:
        spec: interface of the graph.
        inputs: input arrays by name.
        name: name of the output.
        output: its array, which is changed; ``[B, S, V]``, or ``[B, 1, V]`` of the last position, or a cache
            ``[B, h_kv, T, w]``.
    """
    tokens_BT = None if spec.padding == "anywhere" else inputs["attention_mask"] == 1
    if tokens_BT is None or tokens_BT.all():
        return
    if name == spec.main_output:
        length = inputs[spec.main_input].shape[1]
        shown = tokens_BT[:, -length:][:, -output.shape[1] :, None]
    else:
        shown = tokens_BT[:, None, :, None]
    np.copyto(output, 0, where=~shown)
