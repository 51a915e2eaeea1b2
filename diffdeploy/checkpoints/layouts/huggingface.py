"""Models of the transformers family: DiffLlama and Motif, with ``o_proj`` and rotate-half embedding.

Source: transformers 5.23 ``DiffLlamaForCausalLM``; Motif-Technologies/Motif-2.6B. DiffLlama stores the heads of
stream 1 first, then those of stream 2, in q, k and v alike; Motif stores pairs and counts layers from 1 less.
"""

from collections.abc import Set as AbstractSet
from functools import partial

from diffdeploy.checkpoints.fields import Fields
from diffdeploy.checkpoints.layouts.base import ROTARY_BUFFERS, Layout, Source, huggingface_rope, lambda_sources

__all__ = ["DIFFLLAMA", "MOTIF"]

_OUTPUT = {"out_proj.weight": Source("o_proj.weight")}

# What the config class takes for a field that a file does not have; save_pretrained leaves none out.
_DIFFLLAMA_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5}

DIFFLLAMA = Layout(
    name="diffllama",
    what="transformers DiffLlamaForCausalLM",
    sources={
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight", halves=True) for name in "qkv"},
        **_OUTPUT,
        **lambda_sources(),
    },
    optional={
        **{f"{name}_proj.bias": Source(f"{name}_proj.bias", halves=True) for name in "qkv"},
        "out_proj.bias": Source("o_proj.bias"),
    },
    # Its norm has no weight; with one, the same keys are Motif's or axolotl's, whose rows stand in another order.
    absent=("subln.weight", "lambda_init"),
    irrelevant=ROTARY_BUFFERS,
    model_types=("diffllama",),
    rope=partial(huggingface_rope, default_theta=_DIFFLLAMA_DEFAULTS["rope_theta"]),
    class_defaults=_DIFFLLAMA_DEFAULTS,
    config_class="DiffLlamaConfig of transformers 5.23",
    norm_eps_field="rms_norm_eps",
    # Both count streams, as the heads of the Llama that it was made from.
    head_fields={"num_attention_heads": ("num_heads", 2), "num_key_value_heads": ("num_kv_heads", 2)},
)


def _refuse_grouped(keys: AbstractSet[str], fields: Fields, layer: int | None) -> str | None:
    if fields.get("num_noise_heads"):
        return "num_noise_heads is set: grouped differential attention shares noise heads, which has no canonical form"
    return None


MOTIF = Layout(
    name="motif",
    what="Motif-2.6B",
    sources={
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight") for name in "qkv"},
        **_OUTPUT,
        **lambda_sources(),
        "subln.weight": Source("subln.weight"),
    },
    optional={f"{name}_proj.bias": Source(f"{'o' if name == 'out' else name}_proj.bias") for name in (*"qkv", "out")},
    # A stored lambda_init is axolotl's, which has the same other keys.
    absent=("lambda_init",),
    irrelevant=ROTARY_BUFFERS,
    # Lower case is what ports of it to other runtimes write.
    model_types=("motif", "Motif"),
    # Its code subtracts 1 from an index that is 0-based already. The weights were trained so: not to be mended here.
    depth_offset=-1,
    rope=huggingface_rope,
    # Not rms_norm_eps, which is that of the norms between the blocks.
    norm_eps_field="attn_rms_norm_eps",
    of_others=("rms_norm_eps",),
    head_fields={"num_attention_heads": ("num_heads", 2), "num_key_value_heads": ("num_kv_heads", 2)},
    refuse=_refuse_grouped,
)
