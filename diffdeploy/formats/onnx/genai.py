"""``genai_config.json``, which makes a bundle a model directory of onnxruntime-genai.

That engine describes a cache by one head size for keys and values, and attention by numbers of heads: on a paired
cache, differential attention is grouped-query attention with ``2h`` heads of width ``2d``.
"""

import json
from pathlib import Path
from typing import Any

from diffdeploy.bundle import Manifest, special_tokens
from diffdeploy.formats.onnx.names import MODEL

__all__ = ["GENAI_CONFIG", "genai_config"]

GENAI_CONFIG = "genai_config.json"


def genai_config(manifest: Manifest, directory: Path) -> bytes | None:
    """Content of the file for a bundle; ``None`` for blocks and for keys and values of different widths.

    Args:
        manifest: manifest of the bundle.
        directory: directory of the bundle, with the files of the model that name special tokens.
    """
    spec, block = manifest.graph, manifest.config.attention
    if spec.variant != "model" or block.key_cache_dim != block.value_dim:
        return None
    tokens = special_tokens(directory, manifest)
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in spec.inputs}
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": MODEL,
        "head_size": block.value_dim,
        "hidden_size": block.embed_dim,
        "num_attention_heads": 2 * block.num_heads,
        "num_key_value_heads": block.num_kv_heads,
        "num_hidden_layers": len(manifest.config.blocks),
        "inputs": {
            **inputs,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            spec.main_output: spec.main_output,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    values = spec.inputs[spec.main_input].values
    assert values is not None
    model = {
        "type": "decoder",
        "vocab_size": values.max + 1,
        "context_length": spec.axes["total_sequence_length"].max,
        # The engine requires one, but does not insert it on its own.
        "bos_token_id": tokens.fill if tokens.begin is None else tokens.begin,
        "eos_token_id": list(tokens.end),
        "pad_token_id": tokens.fill,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": spec.axes["total_sequence_length"].max,
        "min_length": 0,
        "num_beams": 1,
        # The operator that counts tokens updates the cache in place.
        "past_present_share_buffer": spec.padding != "anywhere",
    }
    return json.dumps({"model": model, "search": search}, indent=2).encode() + b"\n"
