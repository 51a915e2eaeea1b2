"""Faults in single weights: a missing bias or norm weight, a loss of precision, a wrong last bit."""

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import Stage
from diffdeploy.selftest.conditions import float32, several_heads
from diffdeploy.selftest.constant_fault import constant_fault, next_bit, rows
from diffdeploy.selftest.fault import Fault, FaultTarget

__all__ = ["PRECISION_FAULTS"]

_Q, _K, _V, _OUT = Stage.Q_PROJECTION, Stage.K_PROJECTION, Stage.V_PROJECTION, Stage.OUTPUT_PROJECTION


def _through(dtype: str, array: Array) -> Array:
    # numpy itself has no bfloat16.
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(array.dtype)


def _with_bias(side: str) -> "partial[bool]":
    return partial(_names_weight, name=f"{side}_proj.bias")


def _names_weight(target: FaultTarget, name: str) -> bool:
    return name in target.weights


def _zero_bias(target: FaultTarget, side: str) -> Mapping[str, Array]:
    name = f"{side}_proj.bias"
    return {name: np.zeros_like(target.weights[name])}


def _last_bit(target: FaultTarget, name: str) -> Mapping[str, Array]:
    return {name: next_bit(target.weights[name])}


def _one_off_by_a_thousandth(array: Array) -> Array:
    changed = array.copy()
    flat = changed.reshape(-1)
    # The largest weight, since a thousandth of a weight near 0 would have no effect.
    flat[int(np.argmax(np.abs(array.astype(np.float64))))] *= array.dtype.type(1.001)
    return changed


def _ones(target: FaultTarget, name: str) -> Mapping[str, Array]:
    # A norm that is built without its weight, as in DiffLlama.
    return {name: np.ones_like(target.weights[name])}


def _reverse(target: FaultTarget, name: str) -> Mapping[str, Array]:
    return {name: np.ascontiguousarray(target.weights[name][::-1])}


def _has_query_norm(target: FaultTarget) -> bool:
    return target.config.qk_norm_eps is not None


_BIAS: list[Fault] = [
    constant_fault(
        f"{side}_bias_missing",
        stage,
        f"the bias of {side}_proj is zero",
        partial(_zero_bias, side=side),
        _with_bias(side),
    )
    for side, stage in (("q", _Q), ("k", _K), ("v", _V), ("out", _OUT))
]

_PRECISION: list[Fault] = [
    *(
        constant_fault(
            f"{side}_weight_off_by_one_bit",
            stage,
            f"one weight of {side}_proj is changed to the next representable number",
            partial(_last_bit, name=f"{side}_proj.weight"),
        )
        for side, stage in (("q", _Q), ("k", _K), ("v", _V), ("out", _OUT))
    ),
    constant_fault(
        "gamma_off_by_one_bit",
        Stage.NORM,
        "one weight of the norm is changed to the next representable number",
        partial(_last_bit, name="subln.weight"),
        partial(_names_weight, name="subln.weight"),
    ),
    *(
        constant_fault(
            f"{side}_weights_rounded_to_{dtype}",
            stage,
            f"the weights of {side}_proj were rounded to {dtype}",
            # Bound as defaults, since a closure would see the last values of the loop.
            lambda s, side=side, dtype=dtype: rows(s, side, partial(_through, dtype)),  # type: ignore[misc]
            float32,
        )
        for side, stage, dtype in (("q", _Q, "bfloat16"), ("v", _V, "float16"), ("out", _OUT, "bfloat16"))
    ),
    constant_fault(
        "one_value_weight_off_by_a_thousandth",
        _V,
        "one weight of v_proj is off by a thousandth",
        lambda s: rows(s, "v", _one_off_by_a_thousandth),
    ),
]

_NORMS: list[Fault] = [
    constant_fault(
        "gamma_missing",
        Stage.NORM,
        "the weight of the norm is 1",
        partial(_ones, name="subln.weight"),
        partial(_names_weight, name="subln.weight"),
    ),
    constant_fault(
        "gamma_reversed",
        Stage.NORM,
        "the weight of the norm in reverse order",
        partial(_reverse, name="subln.weight"),
        partial(_names_weight, name="subln.weight"),
    ),
    constant_fault(
        "query_norm_weight_missing",
        _Q,
        "the weight of the query norm is 1",
        partial(_ones, name="q_norm.weight"),
        _has_query_norm,
    ),
    constant_fault(
        "key_norm_weight_missing",
        _K,
        "the weight of the key norm is 1",
        partial(_ones, name="k_norm.weight"),
        _has_query_norm,
    ),
    constant_fault(
        "lambda_projection_reversed",
        Stage.LAMBDA,
        "lambda of each head computed from the weights of another",
        partial(_reverse, name="lambda_proj.weight"),
        partial(_names_weight, name="lambda_proj.weight"),
        several_heads,
    ),
]


PRECISION_FAULTS = [*_BIAS, *_NORMS, *_PRECISION]
