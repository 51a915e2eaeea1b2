"""Conditions under which a fault changes a bundle, such as heads that can be confused or a mask that can be ignored."""

from diffdeploy.exact import lambda_value
from diffdeploy.selftest.fault import FaultTarget, When

__all__ = [
    "LONG",
    "cached",
    "causal",
    "causal_without_window",
    "float32",
    "grouped",
    "has_learned_lambda",
    "has_norm",
    "has_one_lambda",
    "has_positions",
    "has_rope",
    "lambda_is_not_one",
    "longer_than",
    "longer_than_64",
    "masked",
    "rows_above",
    "several_heads",
    "several_kv_heads",
    "several_pairs",
    "version_1",
    "window_above_64",
    "without_window",
]

# Length above which faults of long sequences apply: most lengths of the sweep are shorter, and the next one is 65.
LONG = 64
# Number of channels of a stream that has only one pair to rotate.
_ONE_PAIR = 2
# A factor closer to 1 could pass for rounding in half precision.
_VISIBLE = 1e-3


def version_1(target: FaultTarget) -> bool:
    """The block is the paper's, with two key streams per head."""
    return not target.config.streams_share_keys


def has_one_lambda(target: FaultTarget) -> bool:
    """Lambda is one number."""
    return target.config.constant_lambda


def has_learned_lambda(target: FaultTarget) -> bool:
    """Lambda is one number, which follows from its vectors."""
    return target.config.lambda_kind == "layer"


def lambda_is_not_one(target: FaultTarget) -> bool:
    """Lambda is a factor with an effect."""
    config = target.config
    return not config.constant_lambda or abs(lambda_value(config, target.weights) - 1) > _VISIBLE


def has_norm(target: FaultTarget) -> bool:
    """Heads are normalised."""
    return target.config.has_norm


def several_heads(target: FaultTarget) -> bool:
    """There are several heads, so one can be mistaken for another."""
    return target.config.num_heads > 1


def several_kv_heads(target: FaultTarget) -> bool:
    """There are several key/value heads, so one can be mistaken for another."""
    return target.config.num_kv_heads > 1


def grouped(target: FaultTarget) -> bool:
    """Several heads read one key/value head."""
    # Without groups, both key maps are the same.
    return target.config.num_heads > target.config.num_kv_heads


def has_rope(target: FaultTarget) -> bool:
    """The block has a rotary embedding."""
    return target.config.rope is not None


def several_pairs(target: FaultTarget) -> bool:
    """A stream has more than one pair of channels to rotate."""
    # A single pair rotates by position * theta^0, whatever theta is, and has no order.
    rope, width = target.config.rope, target.config.head_dim
    return (width if rope is None else rope.width(width)) > _ONE_PAIR


def causal(target: FaultTarget) -> bool:
    """Positions do not see later ones."""
    return target.config.causal


def without_window(target: FaultTarget) -> bool:
    """The block has no sliding window."""
    return target.config.sliding_window is None


def causal_without_window(target: FaultTarget) -> bool:
    """The mask is the plain causal one."""
    return causal(target) and without_window(target)


def window_above_64(target: FaultTarget) -> bool:
    """A window of 64 would differ from the block's."""
    window = target.config.sliding_window
    return window is None or window > LONG


def longer_than_64(target: FaultTarget) -> bool:
    """Sequences can be longer than 64."""
    return target.spec.axes["sequence_length"].max > LONG


def masked(target: FaultTarget) -> bool:
    """The graph takes an attention mask."""
    return target.spec.variant != "plain"


def cached(target: FaultTarget) -> bool:
    """The graph takes and returns a cache."""
    return target.spec.variant == "cached"


def float32(target: FaultTarget) -> bool:
    """The dtype is float32, so half precision would differ."""
    return target.spec.dtype == "float32"


def has_positions(target: FaultTarget) -> bool:
    """The graph takes positions."""
    return "position_ids" in target.spec.inputs


def longer_than(length: int) -> When:
    """Sequences can be longer than ``length``."""
    return lambda target: target.spec.axes["sequence_length"].max > length


def rows_above(num_rows: int) -> When:
    """A batch can have more rows than ``num_rows``."""
    return lambda target: target.spec.axes["batch_size"].max > num_rows
