"""RePlay's differential attention: a lambda for each head, a stored scale, and a mask from the caller.

Source: sb-ai-lab/RePlay, ``replay/nn/attention.py``. The mask is an argument of every call there, so no file shows
whether a model is causal; masks that differ by head are not supported.
"""

from diffdeploy.checkpoints.layouts.base import Layout, Source, lambda_sources, no_rope

__all__ = ["REPLAY"]

_KEYS = {"q": "W_q", "k": "W_k", "v": "W_v", "out": "W_o"}

REPLAY = Layout(
    name="replay",
    what="RePlay MultiHeadDifferentialAttention",
    sources={
        **{f"{name}_proj.weight": Source(f"{key}.weight") for name, key in _KEYS.items()},
        **lambda_sources(),
        "subln.weight": Source("rms_scale"),
    },
    optional={f"{name}_proj.bias": Source(f"{key}.bias") for name, key in _KEYS.items()},
    causal=None,
    lambda_kind="head",
    numbers={"softmax_scale": "scaling"},
    values="rows",
    rope=no_rope,
)
