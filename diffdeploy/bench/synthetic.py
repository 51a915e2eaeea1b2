"""A block with random weights, for measuring sizes without a checkpoint."""

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import LAMBDA_VECTORS, DiffAttentionConfig, RopeConfig, lambda_init_at

__all__ = ["random_checkpoint"]


def random_checkpoint(*, embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, seed: int = 0) -> Checkpoint:
    """Create the checkpoint of a causal block as in the paper: rotary embedding, norm, lambda of the first layer.

    Projections are N(0, 1/D), so that N(0, 1) inputs give N(0, 1) queries and scores; the norm's weights are near 1.

    Args:
        embed_dim: model width ``D``.
        num_heads: differential heads ``h``.
        num_kv_heads: differential key/value heads.
        head_dim: stream width ``d``.
        seed: random seed for the weights.

    Raises:
        InputError: the sizes are inconsistent.
    """
    config = DiffAttentionConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        lambda_init=lambda_init_at(0),
        output_scale=1 - lambda_init_at(0),
        # As in the paper's code and experiments.
        rope=RopeConfig(style="interleaved", theta=10000.0),
    )
    # Imported after the config has checked the sizes, so that errors do not wait for torch.
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        values = torch.randn(shape, generator=generator)
        # The paper's code initialises the lambda vectors with a standard deviation of 0.1.
        scale = 0.1 if name in LAMBDA_VECTORS or len(shape) == 1 else shape[-1] ** -0.5
        weights[name] = values * scale + (1.0 if name == "subln.weight" else 0.0)
    return Checkpoint(config=config, weights=weights, layout="random", layer=None, keys=[])
