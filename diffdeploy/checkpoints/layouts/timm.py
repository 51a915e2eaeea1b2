"""timm's vision transformers with ``attn_layer='diff'``: packed ``qkv``, not causal, no rotary embedding.

Source: huggingface/pytorch-image-models, ``timm/layers/diff_attention.py``. With ``dual_lambda``, the model learns the
two exponents of lambda directly, not as inner products.
"""

from collections.abc import Set as AbstractSet
from typing import Any

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import Layout, Source, lambda_sources, no_rope, packed

__all__ = ["TIMM", "TIMM_DUAL"]


def _refuse(keys: AbstractSet[str], fields: Fields, layer: int | None) -> str | None:
    if "norm.weight" in keys:
        return "norm.weight (scale_norm) is a second norm before the output projection, which has no canonical form"
    # timm passes on the model's norm_layer, which is LayerNorm in a vision transformer unless set otherwise.
    if "q_norm.bias" in keys:
        return "q_norm.bias belongs to a LayerNorm of queries and keys; accepted: an RMS norm"
    return None


_SHARED: dict[str, Any] = {
    "optional": {
        **packed("qkv.bias", "bias", "q", "k", "v"),
        "out_proj.bias": Source("proj.bias"),
        "q_norm.weight": Source("q_norm.weight"),
        "k_norm.weight": Source("k_norm.weight"),
    },
    "causal": False,
    "rope": no_rope,
    # Default of timm's RmsNorm; only sub_norm is built with another value, 1e-5.
    "qk_norm_eps": 1e-6,
    "refuse": _refuse,
}
_PROJECTIONS = {
    **packed("qkv.weight", "weight", "q", "k", "v"),
    "out_proj.weight": Source("proj.weight"),
    "subln.weight": Source("sub_norm.weight"),
}

TIMM = Layout(name="timm", what="timm DiffAttention", sources={**_PROJECTIONS, **lambda_sources()}, **_SHARED)

TIMM_DUAL = Layout(
    name="timm-dual",
    what="timm DiffAttention with dual_lambda",
    sources={
        **_PROJECTIONS,
        # There are only q vectors: `to_canonical` fills the others with unit vectors, so that the products are these
        # numbers.
        "lambda_q1": Source("lambda_a", scalar=True),
        "lambda_q2": Source("lambda_b", scalar=True),
    },
    **_SHARED,
)
