"""Faults in an artifact's weights: heads, streams and halves in the order of another layout.

Symbols: ``h`` heads, ``h_kv`` key/value heads, 2 streams, ``d`` and ``e`` widths, as in `DiffAttentionConfig`.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import Stage
from diffdeploy.selftest.conditions import (
    has_rope,
    several_heads,
    several_kv_heads,
    several_pairs,
    version_1,
)
from diffdeploy.selftest.constant_fault import (
    columns,
    constant_fault,
    flipped,
    reordered,
    rows,
    times,
)
from diffdeploy.selftest.fault import Fault, FaultTarget

__all__ = ["WEIGHT_FAULTS"]

_Q, _K, _V, _OUT = Stage.Q_PROJECTION, Stage.K_PROJECTION, Stage.V_PROJECTION, Stage.OUTPUT_PROJECTION


def _exchanged(target: FaultTarget, one: str, other: str) -> Mapping[str, Array]:
    """Swap two projections."""
    first, second = f"{one}_proj.weight", f"{other}_proj.weight"
    return {first: target.weights[second], second: target.weights[first]}


def _same_shape(target: FaultTarget, one: str, other: str) -> bool:
    shapes = target.config.weight_shapes()
    return shapes[f"{one}_proj.weight"] == shapes[f"{other}_proj.weight"]


def _turned_pairs(array: Array, width: int) -> Array:
    """Reorder the rows of each stream from neighbouring pairs to halves, as a conversion of the rotary style does."""
    grid = array.reshape(-1, width // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(grid, 1, 2)).reshape(array.shape)


def _is_square(target: FaultTarget) -> bool:
    weight = target.weights["out_proj.weight"]
    return bool(weight.shape[0] == weight.shape[1])


def _without_row(array: Array) -> Array:
    changed = array.copy()
    changed[len(array) // 2] = 0
    return changed


WEIGHT_FAULTS: list[Fault] = [
    constant_fault(
        "query_streams_swapped",
        _Q,
        "signal and noise queries are swapped",
        lambda s: rows(s, "q", flipped((s.config.num_heads, 2), 1)),
    ),
    constant_fault(
        "query_heads_reversed",
        _Q,
        "query heads in reverse order",
        lambda s: rows(s, "q", flipped((s.config.num_heads,), 0)),
        several_heads,
    ),
    constant_fault(
        "query_halves_for_pairs",
        _Q,
        "query rows as [2, h, d] instead of [h, 2, d]",
        # DiffLlama's order, read as if it were Microsoft's.
        lambda s: rows(s, "q", reordered(s.config.num_heads, 2)),
        several_heads,
    ),
    constant_fault(
        "query_rows_of_the_other_rope_style",
        _Q,
        "query rows in the channel order of the other rotary style",
        lambda s: rows(s, "q", partial(_turned_pairs, width=s.config.head_dim)),
        has_rope,
        several_pairs,
    ),
    constant_fault(
        # Reordering both keeps every product of a query and a key, until the rotary embedding rotates other pairs.
        "query_and_key_rows_of_the_other_rope_style",
        _Q,
        "query and key rows in the channel order of the other rotary style",
        lambda s: (
            rows(s, "q", partial(_turned_pairs, width=s.config.head_dim))
            | rows(s, "k", partial(_turned_pairs, width=s.config.head_dim))
        ),
        has_rope,
        several_pairs,
    ),
    constant_fault("query_row_missing", _Q, "one query channel is zero", lambda s: rows(s, "q", _without_row)),
    constant_fault(
        "queries_scaled_twice",
        _Q,
        "the softmax scale is folded into the query weights, and applied again",
        lambda s: rows(s, "q", times(s.config.head_dim**-0.5)),
    ),
    constant_fault(
        "key_streams_swapped",
        _K,
        "signal and noise keys are swapped",
        lambda s: rows(s, "k", flipped((s.config.num_kv_heads, 2), 1)),
        version_1,
    ),
    constant_fault(
        # Each stream is correct, but they are subtracted the wrong way round.
        "query_and_key_streams_swapped",
        _Q,
        "the signal is subtracted instead of the noise",
        lambda s: (
            rows(s, "q", flipped((s.config.num_heads, 2), 1)) | rows(s, "k", flipped((s.config.num_kv_heads, 2), 1))
        ),
        version_1,
    ),
    constant_fault(
        "key_heads_reversed",
        _K,
        "key heads in reverse order",
        lambda s: rows(s, "k", flipped((s.config.num_kv_heads,), 0)),
        several_kv_heads,
    ),
    constant_fault(
        "key_halves_for_pairs",
        _K,
        "key rows as [2, h_kv, d] instead of [h_kv, 2, d]",
        lambda s: rows(s, "k", reordered(s.config.num_kv_heads, 2)),
        several_kv_heads,
        version_1,
    ),
    constant_fault(
        "key_rows_of_the_other_rope_style",
        _K,
        "key rows in the channel order of the other rotary style",
        lambda s: rows(s, "k", partial(_turned_pairs, width=s.config.head_dim)),
        has_rope,
        several_pairs,
    ),
    constant_fault("key_row_missing", _K, "one key channel is zero", lambda s: rows(s, "k", _without_row)),
    constant_fault(
        "keys_and_values_exchanged",
        _K,
        "the weights of the key and value projections are swapped",
        lambda s: _exchanged(s, "k", "v"),
        lambda s: _same_shape(s, "k", "v"),
    ),
    constant_fault(
        "queries_and_keys_exchanged",
        _Q,
        "the weights of the query and key projections are swapped",
        lambda s: _exchanged(s, "q", "k"),
        lambda s: _same_shape(s, "q", "k"),
    ),
    constant_fault(
        "value_heads_reversed",
        _V,
        "value heads in reverse order",
        lambda s: rows(s, "v", flipped((s.config.num_kv_heads,), 0)),
        several_kv_heads,
    ),
    constant_fault(
        "value_halves_swapped",
        _V,
        "the halves of each value are swapped",
        lambda s: rows(s, "v", flipped((s.config.num_kv_heads, 2), 1)),
    ),
    constant_fault(
        "value_halves_for_pairs",
        _V,
        "value rows as [2, h_kv, e / 2] instead of [h_kv, 2, e / 2]",
        # DiffLlama stores values in this order, too.
        lambda s: rows(s, "v", reordered(s.config.num_kv_heads, 2)),
        several_kv_heads,
    ),
    constant_fault("value_row_missing", _V, "one value channel is zero", lambda s: rows(s, "v", _without_row)),
    constant_fault(
        "output_heads_reversed",
        _OUT,
        "columns of the output projection in reverse order of heads",
        lambda s: columns(s, flipped((s.config.num_heads,), 0)),
        several_heads,
    ),
    constant_fault(
        "output_halves_swapped",
        _OUT,
        "the halves of each head's columns are swapped",
        lambda s: columns(s, flipped((s.config.num_heads, 2), 1)),
    ),
    constant_fault(
        "output_halves_for_pairs",
        _OUT,
        "columns as [2, h, e / 2] instead of [h, 2, e / 2]",
        lambda s: columns(s, reordered(s.config.num_heads, 2)),
        several_heads,
    ),
    constant_fault(
        "output_weight_transposed",
        _OUT,
        "the output projection is transposed",
        lambda s: {"out_proj.weight": np.ascontiguousarray(s.weights["out_proj.weight"].T)},
        _is_square,
    ),
]
