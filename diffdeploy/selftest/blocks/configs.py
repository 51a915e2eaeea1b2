"""Correct blocks whose config differs from the bundle's."""

from dataclasses import replace
from typing import Any

from diffdeploy.config import AnyConfig, DiffAttentionConfig
from diffdeploy.graphs import Stage
from diffdeploy.selftest.blocks.entry import config_fault
from diffdeploy.selftest.conditions import (
    causal_without_window,
    grouped,
    has_norm,
    has_rope,
    masked,
    several_pairs,
    version_1,
)

__all__: list[str] = []


def _of_the_other_style(config: Any) -> AnyConfig:
    style = "half" if config.rope.style == "interleaved" else "interleaved"
    changed: AnyConfig = replace(config, rope=replace(config.rope, style=style))
    return changed


def _of_the_other_key_map(config: DiffAttentionConfig) -> AnyConfig:
    return replace(config, gqa_layout="legacy" if config.gqa_layout == "canonical" else "canonical")


config_fault(
    "other_key_map", Stage.SIGNAL, "the other key map of grouped queries", _of_the_other_key_map, version_1, grouped
)
config_fault(
    "rope_of_the_other_style",
    Stage.ROPE,
    "channels are rotated in halves instead of pairs, or in pairs instead of halves",
    _of_the_other_style,
    has_rope,
    several_pairs,
)
config_fault(
    "rope_missing",
    Stage.ROPE,
    "no rotary embedding",
    lambda config: replace(config, rope=None),
    has_rope,
    lambda target: not masked(target),
)
config_fault(
    "not_causal",
    Stage.SIGNAL,
    "every position sees all others",
    lambda config: replace(config, causal=False),
    causal_without_window,
)
config_fault(
    "causal_without_reason",
    Stage.SIGNAL,
    "positions do not see later ones, though they should",
    lambda config: replace(config, causal=True),
)
config_fault("window_missing", Stage.SIGNAL, "no sliding window", lambda config: replace(config, sliding_window=None))
config_fault(
    "window_off_by_one",
    Stage.SIGNAL,
    "a sliding window with one more key",
    lambda config: replace(config, sliding_window=config.sliding_window and config.sliding_window + 1),
)
config_fault(
    "gamma_not_applied",
    Stage.NORM,
    "a norm without its weight",
    lambda config: replace(config, norm_affine=False),
    has_norm,
)
