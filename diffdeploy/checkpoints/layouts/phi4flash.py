"""Phi-4-mini-flash-reasoning: attention layers with packed ``Wqkv``, biases and no rotary embedding.

Source: microsoft/Phi-4-mini-flash-reasoning (SambaY). It has 32 layers: the even ones are Mamba or gated memory units,
1 to 15 have a sliding window, 17 has full attention, and 19 to 31 read the keys and values of layer 17.
"""

from collections.abc import Set as AbstractSet

from diffdeploy.checkpoints.fields import Fields, typed_field
from diffdeploy.checkpoints.layouts.base import Layout, Source, UnknownWindowError, lambda_sources, no_rope, packed

__all__ = ["PHI4FLASH"]


def _full_layer(fields: Fields) -> int:
    """Index of the layer whose keys and values the later layers read: the first one after the middle."""
    # 32 layers in the published model and by default in its config class.
    return (typed_field(fields, "num_hidden_layers", int) or 32) // 2 + 1


def _window(fields: Fields, layer: int | None) -> int | None:
    if layer is None or layer >= _full_layer(fields):
        return None
    # 512 in the published model, but 2047 by default in its config class: without the field, the window is unknown.
    if "sliding_window" not in fields:
        raise UnknownWindowError("sliding_window is missing")
    window: object = fields["sliding_window"]
    # Its config class expands the number to a list with an entry for each layer, and saves that list.
    if isinstance(window, list):
        window = window[layer] if layer < len(window) else None
    return typed_field({"sliding_window": window}, "sliding_window", int)


def _refuse_cross(keys: AbstractSet[str], fields: Fields, layer: int | None) -> str | None:
    if layer is not None and layer > _full_layer(fields):
        return (
            f"layer {layer} is a cross-attention layer: it has no keys and values of its own and reads those of layer "
            f"{_full_layer(fields)}, so it cannot be deployed alone"
        )
    return None


# Despite its name, this module holds the norm and lambda of self-attention layers, too.
_INNER = "inner_cross_attn."

PHI4FLASH = Layout(
    name="phi4flash",
    what="Phi-4-mini-flash-reasoning",
    sources={
        **packed("Wqkv.weight", "weight", "q", "k", "v"),
        **packed("Wqkv.bias", "bias", "q", "k", "v"),
        "out_proj.weight": Source("out_proj.weight"),
        "out_proj.bias": Source("out_proj.bias"),
        **lambda_sources(_INNER),
        "subln.weight": Source(_INNER + "subln.weight"),
    },
    # Positions come from the Mamba layers in between, although its config has a rope_theta.
    rope=no_rope,
    head_fields={"num_attention_heads": ("num_heads", 2), "num_key_value_heads": ("num_kv_heads", 2)},
    sliding_window=_window,
    reads_window=True,
    # Field of the norms between the blocks, which are LayerNorms.
    of_others=("layer_norm_eps",),
    refuse=_refuse_cross,
    why_no_model=(
        "half of its layers are state-space models or gated memory units, and the attention layers after the middle "
        "read the keys and values of another layer"
    ),
)
