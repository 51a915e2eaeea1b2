"""Back from a canonical block to the keys and rows of a layout, bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.checkpoints.rows import from_canonical
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError

__all__ = ["write_checkpoint"]


def write_checkpoint(
    config: AnyConfig, weights: Mapping[str, Tensor], layout: str, *, prefix: str = "", noise_repeat: int = 1
) -> dict[str, Tensor]:
    """The state dict of a block in a layout.

    Args:
        config: of the block.
        weights: canonical weights, such as ``block.state_dict()``.
        layout: name of a layout.
        prefix: put before each key.
        noise_repeat: heads that share one noise query, in a layout that has such groups.

    Raises:
        InputError: the layout is not known or cannot hold the block.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if chosen.version != config.version:
        raise InputError(f"layout {layout} is of version {chosen.version}, and the block of version {config.version}")
    # No key says it: the file would be read back as the layout is, and compute something else.
    if chosen.causal is not None and chosen.causal != config.causal:
        raise InputError(f"layout {layout} is {'causal' if chosen.causal else 'not causal'}, unlike the block")
    for name in ("lambda_init", "output_scale"):
        wanted = getattr(chosen, name)
        if wanted is not None and wanted != getattr(config, name):
            raise InputError(f"layout {layout} has {name} {wanted:g}, and the block {getattr(config, name)}")
    if noise_repeat > 1 and chosen.noise_repeat is None:
        raise InputError(f"layout {layout} has no heads that share a noise query")
    sizes = Sizes(config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, noise_repeat)
    state = from_canonical(chosen, weights, sizes)
    if chosen.lambda_init_key is not None:
        state[chosen.lambda_init_key] = _stored_lambda_init(config, layout)
    return {prefix + key: tensor for key, tensor in state.items()}


def _stored_lambda_init(config: AnyConfig, layout: str) -> Tensor:
    stored = torch.tensor(config.lambda_init, dtype=torch.float32)
    if float(stored) != config.lambda_init:
        raise InputError(f"layout {layout} stores lambda_init in float32, which does not hold {config.lambda_init}")
    return stored
