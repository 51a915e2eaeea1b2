"""The table of layouts, and what is known of those that cannot be read."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import Layout, Source
from diffdeploy.checkpoints.layouts.diffclip import DIFFCLIP
from diffdeploy.checkpoints.layouts.huggingface import AXOLOTL, DIFFLLAMA, MOTIF
from diffdeploy.checkpoints.layouts.microsoft import DIFFDEPLOY, MICROSOFT, MICROSOFT_V2, SDPADIFF
from diffdeploy.checkpoints.layouts.phi4flash import PHI4FLASH
from diffdeploy.checkpoints.layouts.timm import TIMM, TIMM_DUAL

__all__ = ["LAYOUTS", "UNSUPPORTED", "Layout", "Source"]

# In the order in which they are tried; the first of those with the same keys gives its name where they mean the same.
LAYOUTS = {
    layout.name: layout
    for layout in (
        *(DIFFDEPLOY, MICROSOFT, SDPADIFF, MICROSOFT_V2, DIFFLLAMA, MOTIF, AXOLOTL, PHI4FLASH, TIMM, TIMM_DUAL),
        DIFFCLIP,
    )
}

# Differential attention that is recognised and refused: the key that shows it, and why.
UNSUPPORTED: tuple[tuple[Callable[[AbstractSet[str], Fields], bool], str], ...] = (
    (
        lambda keys, fields: any(key.endswith("wq_b_gate.weight") for key in keys),
        "it is Motif-3 (wq_b_gate): latent attention with grouped noise heads, which has no canonical form",
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
        "its weights are quantised; accepted are fp64, fp32, fp16 and bf16",
    ),
)
