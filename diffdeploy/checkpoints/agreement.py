"""Fields of ``config.json`` that concern attention must agree with the block; a contradiction is an error.

A layout reads the fields that its code base uses. The file may contain others, written by hand, by a trainer or by a
later revision. If one contradicts the block, only the user can say which of the two is correct.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffdeploy.checkpoints.fields import shortened
from diffdeploy.checkpoints.settings import BlockSettings
from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError

__all__ = ["require_agreement"]


class _Fact(NamedTuple):
    """A fact about a block, and the fields that may state it.

    Attributes:
        fields: names of the fields.
        option: the option that settles the fact, or a hint if there is no such option.
        has: function that returns the block's own value; ``_NOTHING`` if the fact does not apply to the block.
        says: function that converts a field to the terms of ``has``; ``_NOTHING`` if the field states nothing.
        settled: function that returns true if an option or the layout already settles the fact.
    """

    fields: tuple[str, ...]
    option: str
    has: Callable[[AnyConfig], Any]
    says: Callable[[Any], Any]
    settled: Callable[[BlockSettings], bool]


_NOTHING = object()


def _as_it_is(value: Any) -> Any:
    return _NOTHING if value is None else value


def _window(value: Any) -> Any:
    # 0 and -1 mean no window in several code bases; a list has an entry per layer, which the layout reads.
    if isinstance(value, list):
        return _NOTHING
    return None if value in (None, 0, -1, False) else value


def _uses(value: Any) -> Any:
    """A switch that is off or absent states nothing about the setting it controls."""
    return True if value is True else _NOTHING


def _scales(value: Any) -> Any:
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
    return _NOTHING if kind in (None, "default") else True


def _no_cap(value: Any) -> Any:
    return _NOTHING if value in (None, 0, 0.0, False) else value


def _has_bias(config: AnyConfig) -> bool:
    return any(name.endswith("_proj.bias") for name in config.weight_shapes())


def _knows_window(settings: BlockSettings) -> bool:
    # If the accompanying switch is off, the number does not apply to this model.
    return settings.options.sliding_window is not None or settings.fields.get("use_sliding_window") is False


def _never(_: BlockSettings) -> bool:
    return False


# Some code bases count differential heads, others count each stream as a head; both follow from the shapes.
_COUNTS = tuple(
    _Fact(
        (name,),
        "from the shapes",
        has,
        _as_it_is,
        lambda settings, name=name: name in settings.layout.head_fields,  # type: ignore[misc]  # bound by default
    )
    for names, has in (
        (("num_attention_heads", "num_heads"), lambda config: (config.num_heads, 2 * config.num_heads)),
        (("num_key_value_heads", "num_kv_heads"), lambda config: (config.num_kv_heads, 2 * config.num_kv_heads)),
        (("head_dim",), lambda config: (config.head_dim, 2 * config.head_dim)),
    )
    for name in names
)

_FACTS = (
    *_COUNTS,
    _Fact(
        ("causal", "is_causal"),
        "--causal or --no-causal",
        lambda config: config.causal,
        _as_it_is,
        lambda settings: settings.options.causal is not None,
    ),
    _Fact(
        ("sliding_window",),
        "--sliding-window",
        lambda config: config.sliding_window,
        _window,
        lambda settings: settings.layout.reads_window or _knows_window(settings),
    ),
    _Fact(
        ("sliding_window_size", "window_size"),
        "--sliding-window",
        lambda config: config.sliding_window,
        _window,
        _knows_window,
    ),
    _Fact(
        ("use_sliding_window",),
        "--sliding-window",
        lambda config: config.sliding_window is not None,
        _uses,
        lambda settings: settings.options.sliding_window is not None,
    ),
    _Fact(
        ("lambda_init",),
        "--lambda-init",
        lambda config: config.lambda_init,
        _as_it_is,
        lambda settings: settings.options.lambda_init is not None,
    ),
    _Fact(
        ("norm_eps", "rms_norm_eps", "layer_norm_eps", "attn_rms_norm_eps"),
        "--norm-eps",
        lambda config: config.norm_eps,
        _as_it_is,
        lambda settings: settings.options.norm_eps is not None or not settings.has_norm(),
    ),
    _Fact(("attention_bias", "qkv_bias", "use_bias"), "from the tensors", _has_bias, _uses, _never),
    # Axolotl's field: with split heads, two heads of the file make one differential head with values of twice the
    # width.
    _Fact(
        ("split_heads",),
        "from the shapes of the projections",
        lambda config: config.value_dim == 2 * config.head_dim,
        _as_it_is,
        _never,
    ),
    _Fact(
        ("sublayer_norm",),
        "--norm",
        lambda config: config.has_norm,
        _as_it_is,
        lambda settings: settings.options.norm is not None,
    ),
    # Without a rotary embedding, the field states nothing.
    _Fact(
        ("partial_rotary_factor",),
        "from the rotary embedding",
        lambda config: _NOTHING if config.rope is None else config.rope.width(config.head_dim) / config.head_dim,
        _as_it_is,
        _never,
    ),
    _Fact(
        ("rope_theta",),
        "--rope-theta",
        lambda config: _NOTHING if config.rope is None else config.rope.theta,
        _as_it_is,
        lambda settings: settings.options.rope_theta is not None,
    ),
    # Layouts whose code base scales frequencies read these fields; with --rope, nothing would read them.
    _Fact(
        ("rope_scaling", "rope_parameters"),
        "scaling cannot be given by options",
        lambda config: _NOTHING if config.rope is None else config.rope.scaling is not None,
        _scales,
        _never,
    ),
    # No block here computes scores with a cap.
    _Fact(
        ("attn_logit_softcapping", "logit_soft_cap", "attention_softcap"),
        "not supported",
        lambda _: None,
        _no_cap,
        _never,
    ),
)


def require_agreement(settings: BlockSettings, config: AnyConfig) -> None:
    """Check that no field of config.json contradicts a block.

    Args:
        settings: settings of the block that its tensors do not determine.
        config: the resulting config of the block.

    Raises:
        InputError: a field contradicts the block; the message names every such field and the option that settles it.
    """
    contradictions = []
    for fact in _FACTS:
        if fact.settled(settings):
            continue
        for name in fact.fields:
            if name not in settings.fields or _is_of_others(name, settings):
                continue
            said, has = fact.says(settings.fields[name]), fact.has(config)
            if _NOTHING not in (said, has) and not _same(said, has):
                contradictions.append(
                    f"{name} is {shortened(settings.fields[name])}, but the block has {_shown(has)} ({fact.option})"
                )
    if contradictions:
        raise InputError(
            f"config.json contradicts the block that layout {settings.layout.name} finds: "
            f"{'; '.join(contradictions)}; give the option if the block is wrong, or correct the file"
        )


def _is_of_others(name: str, settings: BlockSettings) -> bool:
    """True if the layout knows that a field belongs to another part of the model."""
    return name in settings.layout.of_others


def _shown(has: Any) -> str:
    return " or ".join(map(str, has)) if isinstance(has, tuple) else str(has)


def _same(said: Any, has: Any) -> bool:
    if isinstance(has, tuple):
        return any(_same(said, each) for each in has)
    if isinstance(said, bool) or isinstance(has, bool) or said is None or has is None:
        return said is has
    if isinstance(said, int | float) and isinstance(has, int | float):
        return bool(abs(said - has) <= 1e-12 * max(abs(said), abs(has)))
    return bool(said == has)
