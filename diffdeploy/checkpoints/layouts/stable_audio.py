"""Stable Audio 3's diffusion transformer, whose self-attention subtracts a second attention with a weight of 1.

Source: stabilityai/stable-audio-3, ``DifferentialSelfAttention``. Lambda is 1, heads have no norm, values are as wide
as one stream, and the first 32 channels of each stream are rotated.
"""

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import Layout, Source, packed
from diffdeploy.config import RopeConfig

__all__ = ["STABLE_AUDIO"]

_ORDER = ("q", "k", "v", "q_noise", "k_noise")


def _rope(fields: Fields, theta: float | None) -> RopeConfig:
    return RopeConfig(style="half", theta=10_000.0 if theta is None else theta, rotary_dim=32)


STABLE_AUDIO = Layout(
    name="stable-audio",
    what="Stable Audio 3, self-attention of its diffusion transformer",
    sources={
        **packed("to_qkv.weight", "weight", *_ORDER),
        "out_proj.weight": Source("to_out.weight"),
        # Both streams share one norm.
        **{f"{side}_norm.weight": Source(f"{side}_norm.weight") for side in "qk"},
    },
    causal=False,
    lambda_kind="fixed",
    lambda_init=1.0,
    values="stream",
    norm="none",
    output_scale=1.0,
    rope=_rope,
    qk_norm_eps=1e-6,
)
