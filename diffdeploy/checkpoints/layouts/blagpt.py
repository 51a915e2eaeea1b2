"""BlaGPT, and other descendants of modded-nanogpt, whose rotary embedding rotates by the negative angle.

Source: erogol/BlaGPT, ``bla_gpt/attentions.py``. Its first version has the same keys as Microsoft's, so only the user
can tell them apart; its second has one projection for keys and values, and may normalise queries and keys.
"""

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import Layout, Source, packed
from diffdeploy.checkpoints.layouts.microsoft import MICROSOFT
from diffdeploy.config import RopeConfig

__all__ = ["BLAGPT", "BLAGPT_V2"]


def _rope(fields: Fields, theta: float | None) -> RopeConfig:
    # The source has only this base.
    return RopeConfig(style="half", theta=10_000.0 if theta is None else theta)


BLAGPT = Layout(
    name="blagpt",
    what="BlaGPT MultiheadDiffAttn",
    sources=MICROSOFT.sources,
    optional=MICROSOFT.optional,
    rope=_rope,
    turns_back=True,
)

BLAGPT_V2 = Layout(
    name="blagpt-v2",
    what="BlaGPT MultiheadDiffAttnv2",
    sources={
        "q_proj.weight": Source("q_proj.weight"),
        **packed("kv_proj.weight", "weight", "k", "v"),
        "out_proj.weight": Source("c_proj.weight"),
        "lambda_proj.weight": Source("lambda_proj.weight"),
    },
    optional={f"{side}_norm.weight": Source(f"{side}_norm.weight") for side in "qk"},
    version=2,
    lambda_kind="token",
    values="stream",
    norm="none",
    rope=_rope,
    turns_back=True,
    # Epsilon of the source's own norm; with apex installed, the source uses the default of that package instead.
    qk_norm_eps=1e-8,
)
