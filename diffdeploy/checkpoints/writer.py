"""Bit-exact conversion of a canonical block to the keys and rows of a layout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffdeploy.checkpoints.layouts import LAYOUTS, Layout
from diffdeploy.checkpoints.rows import from_canonical, turned_back
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError

__all__ = ["write_checkpoint"]


def write_checkpoint(
    config: AnyConfig, weights: Mapping[str, Tensor], layout: str, *, prefix: str = "", noise_repeat: int = 1
) -> dict[str, Tensor]:
    """Create the state dict of a block in a layout.

    Args:
        config: config of the block.
        weights: canonical weights, such as ``block.state_dict()``.
        layout: name of a layout.
        prefix: prefix of each key.
        noise_repeat: number of heads that share one noise query, in a layout with such groups.

    Raises:
        InputError: the layout is unknown or cannot represent the block.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if chosen.version != config.version:
        raise InputError(f"layout {layout} has version {chosen.version}, but the block has version {config.version}")
    # No key shows whether a block is causal: it would be read back with the layout's setting, and compute something
    # else.
    if chosen.causal is not None and chosen.causal != config.causal:
        raise InputError(f"layout {layout} is {'causal' if chosen.causal else 'not causal'}, unlike the block")
    for name in ("lambda_init", "output_scale"):
        wanted = getattr(chosen, name)
        if wanted is not None and wanted != getattr(config, name):
            raise InputError(f"layout {layout} has {name} {wanted:g}, but the block has {getattr(config, name)}")
    if noise_repeat > 1 and chosen.noise_repeat is None:
        raise InputError(f"layout {layout} has no heads that share a noise query")
    _require_same_kind(chosen, config)
    key_dim = config.num_key_streams // config.num_kv_heads * config.head_dim
    sizes = Sizes(
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.value_dim,
        key_dim,
        noise_repeat,
    )
    state = from_canonical(chosen, turned_back(weights, sizes) if chosen.turns_back else weights, sizes)
    state |= {key: _number(config, fact, layout) for fact, key in chosen.numbers.items()}
    return {prefix + key: tensor for key, tensor in state.items()}


def _require_same_kind(layout: Layout, config: AnyConfig) -> None:
    """Check that facts which no key shows are the same in the layout and in the block.

    Raises:
        InputError: a fact differs; the message names it.
    """
    widths = {"pair": 2 * config.head_dim, "stream": config.head_dim, "rows": config.value_dim}
    norms = {"rms": True, "none": False, "weighted": config.norm_affine}
    facts: list[tuple[str, Any, Any]] = [
        ("lambda_kind", layout.lambda_kind, config.lambda_kind),
        ("width of values", widths[layout.values], config.value_dim),
        ("has_norm", norms[layout.norm], config.has_norm),
    ]
    if "softmax_scale" not in layout.numbers:
        facts.append(("softmax_scale", config.head_dim**-0.5, config.scale))
    if layout.rope is not None:
        rope = layout.rope({}, 1.0 if config.rope is None else config.rope.theta)
        has = None if config.rope is None else (config.rope.style, config.rope.rotary_dim)
        facts.append(("rope", None if rope is None else (rope.style, rope.rotary_dim), has))
    for name, wanted, given in facts:
        if wanted != given:
            raise InputError(f"{name} is {wanted} in layout {layout.name}, but {given} in the block")


def _number(config: AnyConfig, fact: str, layout: str) -> Tensor:
    value = config.scale if fact == "softmax_scale" else getattr(config, fact)
    stored = torch.tensor(value, dtype=torch.float32)
    if float(stored) != value:
        raise InputError(f"layout {layout} stores {fact} in float32, which cannot represent {value}")
    return stored
