"""Faults in an artifact's numbers other than weights: lambda, rotary tables, scales, epsilon, factor."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import LAMBDA_VECTORS, RopeConfig, lambda_init_at
from diffdeploy.exact import lambda_value, rope_tables
from diffdeploy.graphs import Stage
from diffdeploy.selftest.conditions import (
    float32,
    has_learned_lambda,
    has_norm,
    has_one_lambda,
    has_rope,
    several_pairs,
)
from diffdeploy.selftest.constant_fault import constant_fault, scalar
from diffdeploy.selftest.fault import Fault, FaultTarget

__all__ = ["NUMBER_FAULTS"]

# Relative to the correct value: a smaller fault could pass for rounding in half precision.
_VISIBLE = 1e-3
# Lambda may happen to be a short number; rounding it counts as a fault only if that changes it far more than float32
# rounding does.
_MORE_THAN_FLOAT32 = 1e-5

_LAMBDA, _ROPE, _NORM, _SIGNAL = Stage.LAMBDA, Stage.ROPE, Stage.NORM, Stage.SIGNAL


def _lambda(target: FaultTarget) -> float:
    return lambda_value(target.config, target.weights)


def _lambda_init(target: FaultTarget) -> float:
    assert target.config.lambda_init is not None
    return target.config.lambda_init


def _norm_eps(target: FaultTarget) -> float:
    assert target.config.norm_eps is not None
    return target.config.norm_eps


def _exponentials(target: FaultTarget) -> tuple[float, float]:
    q1, k1, q2, k2 = (target.weights[name].astype(np.float64) for name in LAMBDA_VECTORS)
    return math.exp(q1 @ k1), math.exp(q2 @ k2)


def _lambda_fault(
    name: str, breaks: str, value: Callable[[FaultTarget], float], *conditions: Callable[[FaultTarget], bool]
) -> Fault:
    """Create a fault in lambda, which applies if it changes lambda by over a thousandth, so rounding cannot hide it."""

    def differs(target: FaultTarget) -> bool:
        return abs(value(target) - _lambda(target)) > _VISIBLE * abs(_lambda(target))

    return constant_fault(name, _LAMBDA, breaks, lambda s: scalar("lambda", value(s)), *conditions, differs)


_LAMBDAS = [
    _lambda_fault("lambda_negated", "the noise is added", lambda s: -_lambda(s), has_one_lambda),
    _lambda_fault("lambda_zero", "the noise is not subtracted", lambda _: 0.0, has_one_lambda),
    _lambda_fault(
        "lambda_of_the_next_layer",
        "lambda_init of the layer after this one",
        lambda s: _lambda(s) - _lambda_init(s) + _lambda_init_after(_lambda_init(s), 1),
        has_learned_lambda,
    ),
    _lambda_fault(
        "lambda_of_the_layer_before",
        "lambda_init of the layer before this one",
        lambda s: _lambda(s) - _lambda_init(s) + _lambda_init_after(_lambda_init(s), -1),
        has_learned_lambda,
    ),
    _lambda_fault(
        "lambda_init_alone", "the lambda vectors are not used", lambda s: _lambda_init(s), has_learned_lambda
    ),
    _lambda_fault(
        "lambda_without_init", "lambda_init is omitted", lambda s: _lambda(s) - _lambda_init(s), has_learned_lambda
    ),
    _lambda_fault(
        "lambda_terms_exchanged",
        "the second exponential minus the first",
        lambda s: _exponentials(s)[1] - _exponentials(s)[0] + _lambda_init(s),
        has_learned_lambda,
    ),
    _lambda_fault(
        "lambda_without_exponentials",
        "the scalar products without the exponential",
        # The logarithms recover the products.
        lambda s: math.log(_exponentials(s)[0]) - math.log(_exponentials(s)[1]) + _lambda_init(s),
        has_learned_lambda,
    ),
    constant_fault(
        "lambda_rounded_to_bfloat16",
        _LAMBDA,
        "lambda has the 8 bits of bfloat16",
        lambda s: scalar("lambda", float(ml_dtypes.bfloat16(_lambda(s)))),
        has_one_lambda,
        lambda s: (
            s.spec.dtype == "float32" and abs(float(ml_dtypes.bfloat16(_lambda(s))) - _lambda(s)) > _MORE_THAN_FLOAT32
        ),
    ),
    constant_fault(
        "lambda_rounded_to_two_digits",
        _LAMBDA,
        "lambda rounded as in a printed report",
        lambda s: scalar("lambda", round(_lambda(s), 2)),
        has_one_lambda,
        lambda s: s.spec.dtype == "float32" and abs(round(_lambda(s), 2) - _lambda(s)) > _MORE_THAN_FLOAT32,
    ),
]


def _lambda_init_after(value: float, layers: int) -> float:
    """``lambda_init`` some layers after the one that has ``value``; 0.1 more per layer if the depth is unknown."""
    # The inverse of `lambda_init_at`; a lambda_init of 0.8 in all layers, as in DiffCLIP, belongs to no depth.
    share = (0.8 - value) / 0.6
    if not 0.0 < share <= 1.0:
        return value + 0.1 * layers
    # Before the first layer there is none; the condition of the fault then finds no difference.
    return lambda_init_at(max(0, round(-math.log(share) / 0.3) + layers))


def _tables(target: FaultTarget, change: Callable[[RopeConfig], RopeConfig]) -> Mapping[str, Array]:
    """Tables of another rotary embedding."""
    rope = target.config.rope
    assert rope is not None
    # The same length as that of the correct tables, which they replace.
    length = target.spec.axes["sequence_length"].max
    tables = rope_tables(change(rope), target.config.head_dim, length)
    return {f"rope.{name}": table for name, table in zip(("cos", "sin"), tables, strict=True)}


def _edited(target: FaultTarget, name: str, edit: Callable[[Array], Array]) -> Mapping[str, Array]:
    return {name: edit(_tables(target, lambda rope: rope)[name])}


def _shifted(table: Array) -> Array:
    # The last row is repeated, so that the table keeps its length.
    return np.concatenate((table[1:], table[-1:]))


def _wrong_last_row(table: Array) -> Array:
    # Only the longest sequence reads that row.
    return np.concatenate((table[:-1], -table[-1:]))


_ROPES = [
    constant_fault(
        "rope_theta_off_by_a_twentieth",
        _ROPE,
        "a base that is 5 % larger",
        lambda s: _tables(s, lambda rope: replace(rope, theta=1.05 * rope.theta)),
        has_rope,
        several_pairs,
    ),
    constant_fault(
        "rope_theta_of_another_model",
        _ROPE,
        "a base that is 50 times as large",
        # 50 times the usual 10,000 is the 500,000 of Llama 3.
        lambda s: _tables(s, lambda rope: replace(rope, theta=50 * rope.theta)),
        has_rope,
        several_pairs,
    ),
    constant_fault(
        "rope_exponent_over_the_whole_head",
        _ROPE,
        "frequencies theta^(-2j / 2d) instead of theta^(-2j / d)",
        # Using the root of theta gives these frequencies.
        lambda s: _tables(s, lambda rope: replace(rope, theta=rope.theta**0.5)),
        has_rope,
        several_pairs,
    ),
    constant_fault(
        "rope_offset_by_one",
        _ROPE,
        "positions start at 1",
        lambda s: dict(_edited(s, "rope.cos", _shifted)) | dict(_edited(s, "rope.sin", _shifted)),
        has_rope,
    ),
    constant_fault(
        "rope_turns_backwards",
        _ROPE,
        "the sines have the opposite sign",
        lambda s: _edited(s, "rope.sin", np.negative),
        has_rope,
    ),
    constant_fault(
        "rope_sine_and_cosine_exchanged",
        _ROPE,
        "sines and cosines are swapped",
        lambda s: {
            "rope.cos": _tables(s, lambda rope: rope)["rope.sin"],
            "rope.sin": _tables(s, lambda rope: rope)["rope.cos"],
        },
        has_rope,
    ),
    constant_fault(
        "rope_wrong_at_the_last_position",
        _ROPE,
        "the last row of the cosines is negated",
        lambda s: _edited(s, "rope.cos", _wrong_last_row),
        has_rope,
    ),
    constant_fault(
        "rope_rounded_to_bfloat16",
        _ROPE,
        "the cosines were rounded to bfloat16",
        lambda s: _edited(s, "rope.cos", lambda t: t.astype(ml_dtypes.bfloat16).astype(np.float64)),
        has_rope,
        float32,
    ),
]


_SCALES = [
    constant_fault(
        "softmax_scale_of_the_value_width",
        _SIGNAL,
        "scores divided by the square root of 2d",
        # The default of an attention operator whose queries are padded to the width of the values.
        lambda s: scalar("softmax_scale", (2 * s.config.head_dim) ** -0.5),
    ),
    constant_fault("softmax_scale_missing", _SIGNAL, "scores not divided", lambda _: scalar("softmax_scale", 1.0)),
    constant_fault(
        "softmax_scale_without_root",
        _SIGNAL,
        "scores divided by d",
        lambda s: scalar("softmax_scale", 1 / s.config.head_dim),
    ),
    constant_fault(
        "norm_eps_of_another_model",
        _NORM,
        "a tenth of epsilon",
        lambda s: scalar("norm_eps", _norm_eps(s) / 10),
        has_norm,
    ),
    constant_fault(
        "norm_eps_large",
        _NORM,
        "a hundred times epsilon",
        lambda s: scalar("norm_eps", _norm_eps(s) * 100),
        has_norm,
    ),
    constant_fault(
        "output_factor_missing",
        _NORM,
        "no factor after the norm",
        lambda _: scalar("output_scale", 1.0),
        has_norm,
        lambda s: abs(s.config.output_scale - 1.0) > _VISIBLE,
    ),
    constant_fault(
        "output_factor_is_lambda_init",
        _NORM,
        "lambda_init instead of 1 - lambda_init",
        lambda s: scalar("output_scale", 1.0 - s.config.output_scale),
        has_norm,
        # At 0.5, lambda_init and 1 - lambda_init are the same.
        lambda s: abs(s.config.output_scale - 0.5) > _VISIBLE,
    ),
    constant_fault(
        "output_factor_of_the_next_layer",
        _NORM,
        "1 - lambda_init of the layer after this one",
        lambda s: scalar("output_scale", 1.0 - _lambda_init_after(1.0 - s.config.output_scale, 1)),
        has_norm,
    ),
]

NUMBER_FAULTS = [*_LAMBDAS, *_ROPES, *_SCALES]
