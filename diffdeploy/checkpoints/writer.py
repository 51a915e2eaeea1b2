"""Back from a canonical block to the keys and rows of a layout, bit for bit."""

from collections.abc import Mapping

from torch import Tensor

from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.checkpoints.rows import from_canonical
from diffdeploy.checkpoints.sizes import Sizes
from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError

__all__ = ["write_checkpoint"]


def write_checkpoint(
    config: AnyConfig, weights: Mapping[str, Tensor], layout: str, *, prefix: str = ""
) -> dict[str, Tensor]:
    """The state dict of a block in a layout.

    Args:
        config: of the block.
        weights: canonical weights, such as ``block.state_dict()``.
        layout: name of a layout.
        prefix: put before each key.

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
    sizes = Sizes(config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim)
    return {prefix + key: tensor for key, tensor in from_canonical(chosen, weights, sizes).items()}
