"""DiffCLIP: Microsoft's rows with biases, another name for the norm, and one lambda_init for all layers.

Source: hammoudhasan/DiffCLIP; arXiv 2503.06626. The vision tower is not causal, but the text tower is.
"""

from diffdeploy.checkpoints.layouts.base import Layout, Source, lambda_sources, no_rope

__all__ = ["DIFFCLIP"]

_ALL = ("q", "k", "v", "out")

DIFFCLIP = Layout(
    name="diffclip",
    what="DiffCLIP, vision and text tower",
    sources={
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight") for name in _ALL},
        **lambda_sources(),
        "subln.weight": Source("diff_norm.weight"),
    },
    optional={f"{name}_proj.bias": Source(f"{name}_proj.bias") for name in _ALL},
    causal=None,
    causal_by_prefix={"visual.": False, "transformer.resblocks.": True},
    lambda_init=0.8,
    rope=no_rope,
)
