"""Every layout with every tensor and field that another block would have: used, or refused by its name.

What neither happens to would be dropped in silence, and verification, which sees the same block as the export, would
pass.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, read_checkpoint
from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.errors import InputError
from tests.checkpoints.test_fuzz import STATES

# Tensors that some code base has beside its projections, with a shape that fits blocks of D 32, h 4 and d 4.
TENSORS: dict[str, tuple[int, ...]] = {
    **{f"{name}_proj.bias": (32,) for name in ("q", "k", "v", "out", "o")},
    **{f"{name}.bias": (32,) for name in ("proj", "W_q", "W_k", "W_v", "W_o", "to_out", "c_proj", "subln", "sub_norm")},
    "qkv.bias": (96,),
    "Wqkv.bias": (64,),
    "kv_proj.bias": (32,),
    "to_qkv.bias": (160,),
    **{f"{name}.weight": (8,) for name in ("subln", "subnorm", "sub_norm", "norm", "group_norm", "diff_norm")},
    "rms_scale": (8,),
    **{f"{side}_norm.weight": (4,) for side in "qk"},
    **{f"{side}_norm.bias": (4,) for side in "qk"},
    **{
        f"{name}.weight": (32, 32)
        for name in ("g_proj", "gate", "gate_proj", "q_proj2", "lambda_proj", "to_q", "to_kv")
    },
    **{f"lambda_{name}": (4,) for name in ("q3", "k3", "d1")},
    "lambda_init": (),
    "lambda_scale": (),
    "scaling": (),
    "sinks": (4,),
    "relative_position_bias_table": (49, 4),
    "rel_pos.relative_position_bias_table": (49, 4),
    "alibi_slopes": (4,),
    "conv.weight": (32, 1, 3),
    "q_proj.lora_A.weight": (4, 32),
}

# Fields that contradict the blocks below, and the attribute of the config that they would change, with its value.
FACTS: dict[str, tuple[object, str, object]] = {
    "causal": (None, "causal", None),
    "is_causal": (None, "causal", None),
    "sliding_window": (3, "sliding_window", 3),
    "sliding_window_size": (3, "sliding_window", 3),
    "window_size": (3, "sliding_window", 3),
    "use_sliding_window": (True, "sliding_window", ...),
    "lambda_init": (0.123, "lambda_init", 0.123),
    "norm_eps": (0.5, "norm_eps", 0.5),
    "rms_norm_eps": (0.5, "norm_eps", 0.5),
    "layer_norm_eps": (0.5, "norm_eps", 0.5),
    "attn_rms_norm_eps": (0.5, "norm_eps", 0.5),
    "attention_bias": (True, "qkv_bias", True),
    "qkv_bias": (True, "qkv_bias", True),
    "use_bias": (True, "qkv_bias", True),
    "attn_logit_softcapping": (30.0, "", None),
    "logit_soft_cap": (30.0, "", None),
    "sublayer_norm": (False, "norm_eps", None),
    "split_heads": (False, "value_dim", 4),
    "partial_rotary_factor": (0.25, "rope", None),
    "rope_theta": (7.0, "rope", None),
    "rope_scaling": (3, "rope", None),
    "rope_parameters": ({"rope_type": "longrope", "factor": 2.0}, "rope", None),
    "num_attention_heads": (999, "num_heads", 999),
    "num_key_value_heads": (998, "num_kv_heads", 998),
    "max_position_embeddings": (-4, "", None),
}
# Fields that say nothing of a block of that layout: epsilons of other norms.
OF_OTHERS = {
    ("motif", "rms_norm_eps"),
    ("phi4flash", "layer_norm_eps"),
    *((layout, eps) for layout in LAYOUTS for eps in FACTS if eps.endswith("_eps") and LAYOUTS[layout].norm == "none"),
}


def block_of(layout: str) -> tuple[dict[str, Tensor], dict[str, Any], CheckpointOptions]:
    """A state dict, fields of config.json and options with which a block of that layout is read."""
    keys = {"sdpadiff": "microsoft", "diffdeploy": "microsoft", "blagpt": "microsoft"}.get(layout, layout)
    generator = torch.Generator().manual_seed(0)
    shapes = dict(STATES[keys])
    if layout in ("timm-dual", "phi4flash"):
        norm = "sub_norm.weight" if layout == "timm-dual" else "inner_cross_attn.subln.weight"
        shapes |= {norm: (8,)}
    if layout == "phi4flash":
        shapes = {name.replace("lambda", "inner_cross_attn.lambda"): shape for name, shape in shapes.items()}
        shapes |= {"out_proj.bias": (32,)}
    state = {name: torch.randn(shape, generator=generator).abs() * 0.1 for name, shape in shapes.items()}
    fields: dict[str, Any] = {}
    if LAYOUTS[layout].model_types:
        fields["model_type"] = LAYOUTS[layout].model_types[0]
    if layout == "phi4flash":
        fields["sliding_window"] = None
    options = CheckpointOptions(layout=layout, gqa_layout="canonical")
    if layout in ("diffllama", "motif", "axolotl"):
        fields["rope_theta"] = 100.0
    known = LAYOUTS[layout]
    if known.version == 1 and known.lambda_init is None and "lambda_init" not in known.numbers:
        options = replace(options, depth=1)
    if known.rope is None:
        options = replace(options, rope="half", rope_theta=100.0)
    if known.causal is None:
        options = replace(options, causal=True)
    return state, fields, options


def read(folder: Path, state: dict[str, Tensor], fields: dict[str, Any], options: CheckpointOptions) -> Checkpoint:
    prefix = "model.layers.1.attn."
    save_file({prefix + name: tensor for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    return read_checkpoint(folder, options)


def is_silent(found: Checkpoint, plain: Checkpoint, key: str) -> bool:
    """Whether a block was read as if the tensor were not there."""
    return found.config == plain.config and not any(used.endswith("." + key) for used in found.keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_is_dropped(layout: str, tmp_path: Path) -> None:
    state, fields, options = block_of(layout)
    plain = read(tmp_path, state, fields, options)
    tried = 0
    for name, shape in TENSORS.items():
        if name in state:
            continue
        tried += 1
        try:
            found = read(tmp_path, {**state, name: torch.full(shape, 0.1)}, fields, options)
        except InputError as error:
            assert name in str(error)  # noqa: PT017 - that it is read is right as well
        else:
            assert not is_silent(found, plain, name), name
    assert tried > 25


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_field_is_ignored(layout: str, tmp_path: Path) -> None:
    state, fields, options = block_of(layout)
    plain = read(tmp_path, state, fields, options).config
    for name, (stated, attribute, wanted) in FACTS.items():
        # What the user has said goes before the file.
        if (layout, name) in OF_OTHERS or (attribute == "causal" and options.causal is not None):
            continue
        value = (not plain.causal) if attribute == "causal" else stated
        try:
            config = read(tmp_path, state, {**fields, name: value}, options).config
        except InputError as error:
            # A kind of rotary embedding is refused by the name that it has inside of the field.
            assert name in str(error) or "rope_type" in str(error)  # noqa: PT017 - that it is used is right as well
            continue
        has = getattr(config, attribute, None)
        if name == "split_heads" and config.value_dim == config.head_dim:
            continue  # which is what the field says
        if name == "rope_theta" and config.rope is not None:
            has = None if config.rope.theta == stated or options.rope_theta is not None else config.rope
        assert has == (value if attribute == "causal" else wanted), f"{name} {value} is silently {has}"
