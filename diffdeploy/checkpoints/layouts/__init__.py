"""The table of layouts, and the layouts that are recognised but cannot be read."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import Layout, Source
from diffdeploy.checkpoints.layouts.blagpt import BLAGPT, BLAGPT_V2
from diffdeploy.checkpoints.layouts.diffclip import DIFFCLIP
from diffdeploy.checkpoints.layouts.huggingface import AXOLOTL, DIFFLLAMA, MOTIF
from diffdeploy.checkpoints.layouts.microsoft import DIFFDEPLOY, MICROSOFT, MICROSOFT_V2, SDPADIFF
from diffdeploy.checkpoints.layouts.phi4flash import PHI4FLASH
from diffdeploy.checkpoints.layouts.replay import REPLAY
from diffdeploy.checkpoints.layouts.stable_audio import STABLE_AUDIO
from diffdeploy.checkpoints.layouts.timm import TIMM, TIMM_DUAL

__all__ = ["LAYOUTS", "UNSUPPORTED", "Layout", "Source"]

# Layouts in the order in which they are tried; among equivalent layouts with the same keys, the first one is reported.
LAYOUTS = {
    layout.name: layout
    for layout in (
        *(DIFFDEPLOY, MICROSOFT, SDPADIFF, MICROSOFT_V2, DIFFLLAMA, MOTIF, AXOLOTL, PHI4FLASH, TIMM, TIMM_DUAL),
        *(DIFFCLIP, BLAGPT, BLAGPT_V2, REPLAY, STABLE_AUDIO),
    )
}


def _has_all(keys: AbstractSet[str], *endings: str) -> bool:
    return all(any(key.endswith(ending) for key in keys) for ending in endings)


# Differential attention that is recognised and rejected: the key that shows it, and the reason.
UNSUPPORTED: tuple[tuple[Callable[[AbstractSet[str], Fields], bool], str], ...] = (
    (
        lambda keys, fields: any(key.endswith("wq_b_gate.weight") for key in keys),
        "it is Motif-3 (wq_b_gate): latent attention with grouped noise heads, which has no canonical form",
    ),
    (
        lambda keys, fields: _has_all(keys, "c_q.weight", "lambda_q1"),
        "it is of the modded-nanogpt family (c_q), whose queries and keys are normalised without a weight in the file, "
        "and with an epsilon that depends on the dtype",
    ),
    (
        lambda keys, fields: any("diff_attn_heads." in key for key in keys),
        "it is kyegomez/DifferentialTransformer (diff_attn_heads): each head has its own projections, and lambda is "
        "an argument of the call",
    ),
    (
        lambda keys, fields: _has_all(
            keys, ".attn.o_proj.weight", ".attn.subln.weight", ".norm1.weight", "mlp.0.weight"
        ),
        "it is PaddleFormers' DiffTransformer (attn.o_proj with norm1 and mlp.0), whose norm runs over all heads "
        "together",
    ),
    (
        lambda keys, fields: any(key.endswith("da.lambda_q1") for key in keys),
        "it is ArchScale's training layout (da.lambda_q1); convert it with ArchScale's own script first",
    ),
    (
        lambda keys, fields: any(key.endswith("linear_qkv.weight") for key in keys),
        "it is Dragon (linear_qkv), whose block has neither norm nor output factor",
    ),
    (
        lambda keys, fields: any(key.endswith((".qweight", ".weight_scale", ".weight_scale_inv")) for key in keys),
        "its weights are quantised; accepted: fp64, fp32, fp16 and bf16",
    ),
)
