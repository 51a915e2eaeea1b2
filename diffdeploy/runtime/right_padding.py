"""Adaptation of padding for graphs that know only how many tokens a row has, and need them to precede all padding.

Callers may pad anywhere: tokens are moved to the front, and results back to the positions of their tokens; results at
padded positions are 0. Without padding, nothing is moved. If tokens are already cached, onnxruntime's operator supports
several new tokens only for one row, so such a batch is fed row by row.

Shape suffixes: B batch, S new tokens, P past tokens, T = P + S.
"""

from collections.abc import Callable, Mapping

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec, clear_padding

__all__ = ["run_right_padded"]

Arrays = Mapping[str, Array]
Run = Callable[[Arrays], dict[str, Array]]


def run_right_padded(spec: GraphSpec, inputs: Arrays, run: Run) -> dict[str, Array]:
    """Compute the outputs by name.

    Args:
        spec: interface of the graph.
        inputs: inputs by name, with padding wherever the graph's ``padding`` allows it.
        run: function that calls the graph.

    Raises:
        InputError: there is padding between the tokens of a row, which the graph does not support.
    """
    tokens_BT, (batch, length) = inputs["attention_mask"] == 1, inputs[spec.main_input].shape
    past_length = tokens_BT.shape[1] - length
    if spec.padding == "contiguous" and (row := _first_with_holes(tokens_BT)) is not None:
        raise InputError(
            f"attention_mask has padding between the tokens of row {row}; with a sliding window, this graph "
            "supports padding only before and after the tokens"
        )
    if past_length and length > 1:
        rows = [
            _one_row(spec, {name: array[row : row + 1] for name, array in inputs.items()}, run) for row in range(batch)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in spec.outputs}
    return run(inputs) if tokens_BT.all() else _moved(spec, inputs, run)


def _one_row(spec: GraphSpec, inputs: Arrays, run: Run) -> dict[str, Array]:
    """Run one row with several new tokens and cached ones; the operator must not see padding among them."""
    mask_T, length = inputs["attention_mask"][0] == 1, inputs[spec.main_input].shape[1]
    if mask_T.all():
        return run(inputs)
    past_T, new_S = mask_T[:-length], mask_T[-length:]
    if not new_S.any():
        # Nothing is computed, and the past is returned.
        given: dict[str, Array] = {}
    else:
        kept = {name: inputs[name][:, :, past_T] for name in spec.caches}
        ones = np.ones((1, int(mask_T.sum())), np.int64)
        of_tokens = {name: inputs[name][:, new_S] for name in (spec.main_input, "position_ids")
                     if name in inputs}  # fmt: skip
        given = run({**of_tokens, "attention_mask": ones, **kept})
    return _moved_back(spec, inputs, given, mask_T[None], new_S[None])


def _moved(spec: GraphSpec, inputs: Arrays, run: Run) -> dict[str, Array]:
    """Run all rows together: prompts, or one new token per row, where the number of past tokens may differ."""
    mask_BT = inputs["attention_mask"] == 1
    past_length = mask_BT.shape[1] - inputs[spec.main_input].shape[1]
    # Nothing here refers to the moved inputs, so that their caches are freed after the run.
    given = run(_moved_inputs(spec, inputs, mask_BT, past_length))
    return _moved_back(spec, inputs, given, mask_BT, mask_BT[:, past_length:])


def _moved_inputs(spec: GraphSpec, inputs: Arrays, mask_BT: Array, past_length: int) -> Arrays:
    """Inputs with the tokens of every row, or of its past if there is one, at the left."""
    fed = dict(inputs)
    if past_length:
        order = np.argsort(~mask_BT[:, :past_length], axis=1, kind="stable")
        for name in spec.caches:
            fed[name] = np.take_along_axis(inputs[name], order[:, None, :, None], axis=2)
        # A new token that is padding is computed, and its result discarded.
        counts = mask_BT[:, :past_length].sum(1) + 1
    else:
        order = np.argsort(~mask_BT, axis=1, kind="stable")
        for name in (spec.main_input, "position_ids"):
            if name in fed:
                fed[name] = np.take_along_axis(inputs[name], order, axis=1)
        counts = np.maximum(mask_BT.sum(1), 1)
    fed["attention_mask"] = (np.arange(mask_BT.shape[1]) < counts[:, None]).astype(np.int64)
    return fed


def _moved_back(
    spec: GraphSpec, inputs: Arrays, given: dict[str, Array], mask_BT: Array, new_BS: Array
) -> dict[str, Array]:
    """Move results back to the positions of their tokens; the past part of the caches is copied from the inputs.

    Each result is removed from ``given``, so that no second copy of all caches is in memory.
    """
    outputs: dict[str, Array] = {}
    batch, length = new_BS.shape
    num_given = batch if given else 0
    past_length = mask_BT.shape[1] - length
    for name, tensor in spec.outputs.items():
        if name == spec.main_output:
            positions = length if spec.logits == "all" else 1
            whole = np.zeros((batch, positions, int(tensor.shape[2])), tensor.dtype)
            for row in range(num_given):
                if positions == 1 and length > 1:
                    whole[row] = given[name][row]  # cleared below if the last position is padding
                else:
                    whole[row, new_BS[row]] = given[name][row, : int(new_BS[row].sum())]
        else:
            source = next(cache for cache, present in spec.caches.items() if present == name)
            _, heads, _, width = tensor.shape
            whole = np.zeros((batch, int(heads), mask_BT.shape[1], int(width)), tensor.dtype)
            whole[:, :, :past_length] = inputs[source]
            for row in range(num_given):
                before, new = int(mask_BT[row, :past_length].sum()), int(new_BS[row].sum())
                places = past_length + np.flatnonzero(new_BS[row])
                whole[row][:, places] = given[name][row, :, before : before + new]
        given.pop(name, None)
        clear_padding(spec, inputs, name, whole)
        outputs[name] = whole
    return outputs


def _first_with_holes(tokens_BT: Array) -> int | None:
    """Index of the first row with padding between tokens; ``None`` if there is none."""
    starts = np.diff(tokens_BT.astype(np.int8), prepend=0, axis=1) == 1
    rows = np.flatnonzero(starts.sum(1) > 1)
    return int(rows[0]) if len(rows) else None
