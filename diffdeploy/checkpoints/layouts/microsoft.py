"""Microsoft unilm: the three V1 modules, their early revision without ``subln.weight``, and V2.

Source: microsoft/unilm, Diff-Transformer and Diff-Transformer-V2. Rows are already in canonical order. Our own sample
and multihead-sdpadiff have the keys of V1.
"""

from typing import Any

from diffdeploy.checkpoints.layouts.base import Layout, Source, lambda_sources

__all__ = ["DIFFDEPLOY", "MICROSOFT", "MICROSOFT_V2", "SDPADIFF"]

_V1: dict[str, Any] = {
    "sources": {
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight") for name in ("q", "k", "v", "out")},
        **lambda_sources(),
    },
    # The revision of October 2024 builds its norm without a weight.
    "optional": {"subln.weight": Source("subln.weight")},
}

# Microsoft's naive and flash modules have the same state-dict keys, but read different key streams.
MICROSOFT = Layout(name="microsoft", what="Microsoft unilm, Diff-Transformer", gqa_layout=None, **_V1)

SDPADIFF = Layout(
    name="sdpadiff",
    what="vasqu/multihead-sdpadiff, variants 1 to 4",
    # All four variants compute the same function as Microsoft's naive module.
    gqa_layout="legacy",
    **_V1,
)

DIFFDEPLOY = Layout(
    name="diffdeploy", what="diffdeploy's own decoder", model_types=("diffdeploy",), gqa_layout="canonical", **_V1
)

MICROSOFT_V2 = Layout(
    name="microsoft-v2",
    what="Microsoft unilm, Diff-Transformer-V2",
    sources={
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight") for name in ("q", "k", "v")},
        "out_proj.weight": Source("o_proj.weight"),
        "lambda_proj.weight": Source("lambda_proj.weight"),
    },
    # No optional keys: neither biases nor a norm exist in this version.
    version=2,
    lambda_kind="token",
    values="stream",
    norm="none",
)
