"""Fields of ``config.json`` that bear on attention must say what the block does, or be refused.

A layout uses the fields that its code base uses. Others may stand in the file all the same: written by hand, by a
trainer, or by a later revision. One that contradicts the block is a question to the user, never a matter of taste.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffdeploy.checkpoints.fields import shortened
from diffdeploy.checkpoints.settings import BlockSettings
from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError

__all__ = ["require_agreement"]


class _Fact(NamedTuple):
    """What some fields would say of a block.

    Attributes:
        fields: names of the fields.
        option: the option that settles it, or what else is to be known.
        has: what the block has; ``_NOTHING`` where it has nothing of the kind.
        says: the value of a field in terms of what the block has; ``_NOTHING`` where it says nothing.
        settled: whether the user has settled it.
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
    # 0 and -1 stand for none in several code bases; a list has an entry per layer, and its layout reads it.
    if isinstance(value, list):
        return _NOTHING
    return None if value in (None, 0, -1, False) else value


def _uses(value: Any) -> Any:
    """A switch that is off, or absent, says nothing of what it would switch on."""
    return True if value is True else _NOTHING


def _scales(value: Any) -> Any:
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else value
    return _NOTHING if kind in (None, "default") else True


def _no_cap(value: Any) -> Any:
    return _NOTHING if value in (None, 0, 0.0, False) else value


def _has_bias(config: AnyConfig) -> bool:
    return any(name.endswith("_proj.bias") for name in config.weight_shapes())


def _knows_window(settings: BlockSettings) -> bool:
    # With the switch beside it off, the number is that of a model which has a window.
    return settings.options.sliding_window is not None or settings.fields.get("use_sliding_window") is False


def _never(_: BlockSettings) -> bool:
    return False


# Code bases count differential heads, or the softmax heads of equal size; both follow from the shapes.
_COUNTS = tuple(
    _Fact(
        (name,),
        "as the shapes say",
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
    _Fact(("attention_bias", "qkv_bias", "use_bias"), "no tensor of a bias", _has_bias, _uses, _never),
    # Axolotl's: with split heads, two of the file's heads make one, whose values are as wide as both.
    _Fact(
        ("split_heads",),
        "the shapes of the projections",
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
    # Of a block without rotary embedding it says nothing.
    _Fact(
        ("partial_rotary_factor",),
        "the rotary embedding",
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
    # A layout whose code base has them reads them; where the user says the rotary embedding, nobody would.
    _Fact(
        ("rope_scaling", "rope_parameters"),
        "a rotary embedding without scaling",
        lambda config: _NOTHING if config.rope is None else config.rope.scaling is not None,
        _scales,
        _never,
    ),
    # A cap on the scores is a function of its own, which no block here computes.
    _Fact(
        ("attn_logit_softcapping", "logit_soft_cap", "attention_softcap"),
        "not supported",
        lambda _: None,
        _no_cap,
        _never,
    ),
)


def require_agreement(settings: BlockSettings, config: AnyConfig) -> None:
    """See that no field of config.json contradicts a block.

    Args:
        settings: what is known of the block beside its tensors.
        config: the block that came of it.

    Raises:
        InputError: one does; the message names every field, and the option that settles it.
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
                    f"{name} is {shortened(settings.fields[name])}, and the block has {_shown(has)} ({fact.option})"
                )
    if contradictions:
        raise InputError(
            f"config.json contradicts what layout {settings.layout.name} makes of the block: "
            f"{'; '.join(contradictions)}; say which is right with the option, or mend the file"
        )


def _is_of_others(name: str, settings: BlockSettings) -> bool:
    """Whether a field belongs to another part of the model, as the layout knows."""
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
