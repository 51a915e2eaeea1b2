"""Models of the transformers family: DiffLlama and Motif, with ``o_proj`` and rotate-half embedding.

Source: transformers 5.23 ``DiffLlamaForCausalLM``; Motif-Technologies/Motif-2.6B. DiffLlama stores the heads of
stream 1 before those of stream 2, in q, k and v alike. Motif stores pairs, and its depth is the layer index minus 1.
"""

from functools import partial

from diffdeploy.checkpoints.fields import Fields, typed_field
from diffdeploy.checkpoints.layouts.base import ROTARY_BUFFERS, Layout, Source, huggingface_rope, lambda_sources
from diffdeploy.errors import InputError

__all__ = ["AXOLOTL", "DIFFLLAMA", "MOTIF"]

_OUTPUT = {"out_proj.weight": Source("o_proj.weight")}

# Defaults of the config class for absent fields; save_pretrained always writes all fields.
_DIFFLLAMA_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5}
_LLAMA_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}

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
    # Its norm has no weight. Keys with one are those of Motif or axolotl, whose rows are ordered differently.
    absent=("subln.weight", "lambda_init"),
    irrelevant=ROTARY_BUFFERS,
    model_types=("diffllama",),
    rope=partial(huggingface_rope, default_theta=_DIFFLLAMA_DEFAULTS["rope_theta"]),
    class_defaults=_DIFFLLAMA_DEFAULTS,
    config_class="DiffLlamaConfig of transformers 5.23",
    eos_token_id=2,
    norm_eps_field="rms_norm_eps",
    # Both fields count streams as heads, since DiffLlama is derived from Llama.
    head_fields={"num_attention_heads": ("num_heads", 2), "num_key_value_heads": ("num_kv_heads", 2)},
)


def _noise_repeat(fields: Fields) -> int:
    """Number of signal heads per noise head; 1 if no field mentions groups.

    Raises:
        InputError: the numbers of heads do not form whole groups.
    """
    noise = typed_field(fields, "num_noise_heads", int)
    if noise is None:
        return 1
    ratio = typed_field(fields, "k_ratio", int)
    if ratio not in (None, 1):
        raise InputError(f"k_ratio in config.json is {ratio}; accepted: 1, one signal key for each noise key")
    heads = typed_field(fields, "num_attention_heads", int)
    if heads is None:
        raise InputError("num_noise_heads is in config.json without num_attention_heads, which includes them")
    if noise < 1 or heads <= noise or heads % noise:
        raise InputError(
            f"num_noise_heads in config.json is {noise}; accepted: a divisor of num_attention_heads, {heads}, that "
            "leaves signal heads"
        )
    return heads // noise - 1


MOTIF = Layout(
    name="motif",
    what="Motif-2.6B, and Motif-2-12.7B with groups of heads that share one noise query",
    sources={
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight") for name in "qkv"},
        **_OUTPUT,
        **lambda_sources(),
        "subln.weight": Source("subln.weight"),
    },
    optional={f"{name}_proj.bias": Source(f"{'o' if name == 'out' else name}_proj.bias") for name in (*"qkv", "out")},
    # Keys with a stored lambda_init are those of axolotl.
    absent=("lambda_init",),
    irrelevant=ROTARY_BUFFERS,
    # Ports to other runtimes write the name in lower case.
    model_types=("motif", "Motif"),
    # Its code subtracts 1 from an index that is already 0-based. The weights were trained that way.
    depth_offset=-1,
    rope=huggingface_rope,
    # This is not rms_norm_eps, which belongs to the norms between the blocks.
    norm_eps_field="attn_rms_norm_eps",
    of_others=("rms_norm_eps",),
    head_fields={"num_attention_heads": ("num_heads", 2), "num_key_value_heads": ("num_kv_heads", 2)},
    noise_repeat=_noise_repeat,
)


AXOLOTL = Layout(
    name="axolotl",
    what="axolotl-ai-cloud/diff-transformer, with split heads or doubled projections",
    sources={
        # With split heads, two heads of the file form one differential head: one of the two is for the noise, and each
        # contributes one half of the differential head's values. With doubled projections, all of the file's heads are
        # differential heads, with values as wide as one stream.
        **{f"{name}_proj.weight": Source(f"{name}_proj.weight", halves=True) for name in "qkv"},
        **_OUTPUT,
        **lambda_sources(),
    },
    optional={"subln.weight": Source("subln.weight")},
    irrelevant=ROTARY_BUFFERS,
    values="rows",
    norm="weighted",
    # lambda_init is a parameter here, and no factor follows the norm.
    numbers={"lambda_init": "lambda_init"},
    output_scale=1.0,
    rope=partial(huggingface_rope, default_theta=_LLAMA_DEFAULTS["rope_theta"]),
    class_defaults=_LLAMA_DEFAULTS,
    config_class="LlamaConfig of transformers 5.23, which axolotl's is derived from",
    eos_token_id=2,
    norm_eps_field="rms_norm_eps",
    head_fields={"num_attention_heads": ("num_heads", None), "num_key_value_heads": ("num_kv_heads", None)},
)
