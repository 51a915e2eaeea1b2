"""Conversion of a canonical decoder to a checkpoint of transformers' ``DiffLlamaForCausalLM``.

DiffLlama's norm of the heads has no weight, its rotary embedding is rotate-half, and either all four projections have
biases or none has. The weight of the norm is therefore multiplied into the output projection, rows are reordered, and
missing biases are zeros. Source: transformers 5.23, ``models/diffllama``.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdeploy.checkpoints.fields import Fields, read_config_fields
from diffdeploy.checkpoints.layouts import LAYOUTS
from diffdeploy.checkpoints.rows import by_halves
from diffdeploy.checkpoints.shards import write_shards
from diffdeploy.checkpoints.skeletons import LLAMA
from diffdeploy.checkpoints.whole import ModelCheckpoint
from diffdeploy.checkpoints.writer import write_checkpoint
from diffdeploy.config import (
    AnyConfig,
    DecoderConfig,
    DiffAttentionConfig,
    DiffAttentionV2Config,
    LayerConfig,
    RopeConfig,
    lambda_init_at,
)
from diffdeploy.errors import InputError

__all__ = ["DEFAULT_POSITIONS", "diffllama_config", "write_diffllama"]

_LAYOUT = "diffllama"
# Default of DiffLlamaConfig, for checkpoints that do not state a maximum sequence length.
DEFAULT_POSITIONS = 2048
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def diffllama_config(config: DecoderConfig) -> DecoderConfig:
    """Config of a decoder after conversion to DiffLlama, as read back from the output of `write_diffllama`.

    Raises:
        InputError: DiffLlama cannot represent the model; the message names the layer and the reason.
    """
    layers = []
    for number, layer in enumerate(config.layers):
        for fine, given, accepted in _facts(number, layer, config):
            if not fine:
                raise InputError(
                    f"DiffLlama cannot represent this model: layer {number} has {given}, but DiffLlama has {accepted}"
                )
        layers.append(replace(layer, attention=_target(number, layer.attention)))
    return replace(config, layers=tuple(layers))


def _facts(number: int, layer: LayerConfig, config: DecoderConfig) -> Iterator[tuple[bool, str, str]]:
    """Facts of a layer, each as a triple: true if DiffLlama shares it, the layer's value, and DiffLlama's."""
    block, mlp = layer.attention, layer.mlp
    # This is checked first, since a block of the second version lacks the attributes that the other checks read.
    if isinstance(block, DiffAttentionV2Config):
        yield False, "differential attention of the second version", "that of the first"
        return
    yield block.lambda_kind == "layer", _LAMBDAS[block.lambda_kind], "one for each layer, from vectors"
    init = lambda_init_at(number)
    yield _alike(block.lambda_init, init), f"lambda_init {block.lambda_init:g}", f"the paper's value, {init:g}"
    yield not block.permutes_key_streams, "the legacy key map", "the canonical one"
    window = block.sliding_window
    yield window is None, f"a sliding window of {window} keys", "none"
    pair = 2 * block.head_dim
    yield block.value_dim == pair, f"values of width {block.value_dim}", f"values of {pair}, twice as wide as a stream"
    scale = float(block.head_dim**-0.5)
    yield _alike(block.scale, scale), f"a softmax scale of {block.scale:g}", f"{scale:g}, as the stream width implies"
    yield block.qk_norm_eps is None, "norms of queries and keys", "none"
    yield from _rope_facts(block)
    eps = config.norm_eps
    yield block.has_norm, "no norm of the heads", "an RMS norm"
    given_eps = f"epsilon {block.norm_eps} in the norm of the heads and {eps} in the other norms"
    yield block.norm_eps == eps, given_eps, "one epsilon"
    yield mlp.kind == "swiglu", "an MLP with PolyNorm", "SwiGLU"
    yield not mlp.bias, "biases in its MLP", "none"
    width, first = mlp.hidden_dim, config.layers[0].mlp.hidden_dim
    yield width == first, f"an MLP of width {width}, and layer 0 one of {first}", "one width"


_LAMBDAS = {"layer": "one lambda", "head": "a lambda for each head", "fixed": "a fixed lambda"}


def _rope_facts(block: DiffAttentionConfig) -> Iterator[tuple[bool, str, str]]:
    rope = block.rope
    yield rope is not None, "no rotary embedding", "one"
    assert rope is not None
    turned = rope.width(block.head_dim)
    yield (
        turned == block.head_dim,
        f"a rotary embedding of {turned} of {block.head_dim} channels",
        "one of all channels",
    )


def _alike(one: float, other: float) -> bool:
    """True if two numbers are equal in float32, the precision in which some checkpoints store them."""
    return bool(np.float32(one) == np.float32(other))


def _target(number: int, block: AnyConfig) -> DiffAttentionConfig:
    """Config of a converted block, once all of its facts are accepted."""
    assert isinstance(block, DiffAttentionConfig)
    assert block.rope is not None
    has_biases = block.qkv_bias or block.out_bias
    return replace(
        block,
        lambda_init=lambda_init_at(number),
        output_scale=1 - lambda_init_at(number),
        rope=replace(block.rope, style="half", rotary_dim=None),
        value_head_dim=None,
        softmax_scale=None,
        norm_affine=False,
        qkv_bias=has_biases,
        out_bias=has_biases,
        # Without groups, both key maps are the same.
        gqa_layout="canonical",
    )


def write_diffllama(found: ModelCheckpoint, directory: Path) -> list[str]:
    """Write a decoder with its ``config.json`` and tokenizer files, as transformers' ``save_pretrained`` does.

    Weights keep their dtypes. The weights of the norms of the heads, and output scales that differ from the paper's,
    are multiplied into the output projections in fp64 and rounded once.

    Args:
        found: the decoder, read from a checkpoint.
        directory: an existing directory.

    Returns:
        Names of the files with weights.

    Raises:
        InputError: DiffLlama cannot represent the model, or a product of weights overflows its dtype.
    """
    target = diffllama_config(found.config)
    fields = _source_fields(found)
    for path in found.companions:
        if path.name != "config.json":
            shutil.copyfile(path, directory / path.name)
    dtype = str(found.weights["embedding.weight"].dtype).removeprefix("torch.")
    config = json.dumps(_config_fields(found, target, dtype, fields), indent=2, allow_nan=False)
    (directory / "config.json").write_text(config + "\n", encoding="utf-8")
    return write_shards(_tensors(found, target), directory)


def _source_fields(found: ModelCheckpoint) -> Fields:
    config = next((path for path in found.companions if path.name == "config.json"), None)
    return {} if config is None else read_config_fields(config)


def _tensors(found: ModelCheckpoint, target: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of the checkpoint, one layer at a time."""
    weights, names = found.weights, set(target.weight_shapes())
    yield LLAMA.embedding, weights["embedding.weight"]
    for number, (before, after) in enumerate(zip(found.config.layers, target.layers, strict=True)):
        own, prefix = f"layers.{number}.", LLAMA.layer.format(number)
        source, block = before.attention, after.attention
        assert isinstance(source, DiffAttentionConfig)
        assert isinstance(block, DiffAttentionConfig)
        given = {name: weights[f"{own}self_attn.{name}"] for name in source.weight_shapes()}
        changed = _block_weights(source, block, given)
        yield from write_checkpoint(block, changed, _LAYOUT, prefix=prefix + LLAMA.block).items()
        for name, key in LLAMA.parts.items():
            if own + name in names:
                yield prefix + key, weights[own + name]
    yield LLAMA.norm, weights["norm.weight"]
    if not target.tied:
        yield LLAMA.head, weights["lm_head.weight"]


def _block_weights(
    source: DiffAttentionConfig, target: DiffAttentionConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Canonical weights of the target, computed from those of the source."""
    assert source.rope is not None
    changed = by_halves(weights, source.head_dim) if source.rope.style == "interleaved" else dict(weights)
    gain = torch.full((source.value_dim,), source.output_scale / target.output_scale, dtype=torch.float64)
    gain = gain * changed.pop("subln.weight", torch.ones(())).double()
    out = changed["out_proj.weight"]
    # Columns are ordered by head, and all heads have the same gain. A gain of 1 keeps the weights bit-identical.
    folded = (out.double() * gain.repeat(source.num_heads)).to(out.dtype)
    if not bool(torch.isfinite(folded).all()):
        raise InputError(
            f"the output projection times the weight of the norm of the heads is too large for {out.dtype}; convert a "
            "checkpoint in float32"
        )
    changed["out_proj.weight"] = folded
    for name, shape in target.weight_shapes().items():
        if name.endswith(".bias") and name not in changed:
            changed[name] = torch.zeros(shape, dtype=changed[name.replace("bias", "weight")].dtype)
    return changed


def _config_fields(found: ModelCheckpoint, target: DecoderConfig, dtype: str, fields: Fields) -> dict[str, Any]:
    """``config.json`` as ``DiffLlamaConfig`` of transformers 5 writes it, where head counts are counts of streams."""
    block, streams = target.attention, LAYOUTS[_LAYOUT].head_fields
    assert isinstance(block, DiffAttentionConfig)
    assert block.rope is not None
    counts = {field: (factor or 1) * getattr(block, name) for field, (name, factor) in streams.items()}
    # Without these fields, the class would use its own default tokens, so they are omitted only if the source's class
    # is the same and the source omits them, too.
    inherits = fields.get("model_type") == _LAYOUT
    tokens = {name: fields.get(name) for name in _SPECIAL_TOKENS if name in fields or not inherits}
    return {
        "architectures": ["DiffLlamaForCausalLM"],
        "model_type": _LAYOUT,
        "dtype": dtype,
        "vocab_size": target.vocab_size,
        "hidden_size": target.embed_dim,
        "intermediate_size": target.layers[0].mlp.hidden_dim,
        "num_hidden_layers": target.num_layers,
        **counts,
        "head_dim": block.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": found.max_positions or DEFAULT_POSITIONS,
        "rms_norm_eps": target.norm_eps,
        "rope_parameters": _rope_fields(block.rope),
        "attention_bias": block.qkv_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": target.tied,
        **tokens,
    }


# Fields of `RopeScaling` that each kind has, by their names in transformers.
_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor", "truncate"),
}


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not None:
        values = {name: getattr(rope.scaling, name) for name in _SCALING[rope.scaling.kind]}
        # Fields that are None in the source are omitted, since both classes have the same defaults.
        fields |= {"rope_type": rope.scaling.kind, **{k: v for k, v in values.items() if v is not None}}
    return fields
