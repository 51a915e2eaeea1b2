"""Outputs at padded positions: arbitrary in most graphs, missing in those that count the tokens of a row."""

from collections.abc import Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs.spec import GraphSpec

__all__ = ["clear_padding"]


def clear_padding(spec: GraphSpec, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Set outputs at padded positions to 0 if the graph counts tokens; otherwise return them unchanged.

    Args:
        spec: interface of the graph.
        inputs: input arrays by name.
        outputs: output arrays by name; ``[B, S, V]``, or ``[B, 1, V]`` of the last position, and caches
            ``[B, h_kv, T, w]``.
    """
    tokens_BT = None if spec.padding == "anywhere" else inputs["attention_mask"] == 1
    if tokens_BT is None or tokens_BT.all():
        return dict(outputs)
    length = inputs[spec.main_input].shape[1]
    cleared = {}
    for name, array in outputs.items():
        if name == spec.main_output:
            shown = tokens_BT[:, -length:][:, -array.shape[1] :, None]
        else:
            shown = tokens_BT[:, None, :, None]
        cleared[name] = np.where(shown, array, np.zeros((), array.dtype))
    return cleared
