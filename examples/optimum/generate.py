"""Generate text from an ONNX model bundle with optimum: python generate.py MODEL NUM_TOKENS PROMPT ...

The bundle must have the standard flavor. Several prompts make a batch, which is padded on the left.
"""

import json
import sys
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import LlamaConfig, PreTrainedTokenizerFast


def load(folder: Path) -> Any:
    """Load the bundle into optimum, which reads the sizes of caches from the config of a model type that it knows.

    In that config, a differential head is one Llama head, whose keys and values are twice as wide as a stream.
    """
    if json.loads((folder / "manifest.json").read_text())["options"]["flavor"] == "ort":
        # GroupQueryAttention counts the tokens of a row and assumes that they precede the padding, so results would be
        # wrong without any message.
        sys.exit(
            "optimum pads on the left, but a bundle of flavor ort requires right padding; export the standard flavor"
        )
    engine = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder = engine["decoder"]
    config = LlamaConfig(
        vocab_size=engine["vocab_size"],
        hidden_size=decoder["hidden_size"],
        num_hidden_layers=decoder["num_hidden_layers"],
        num_attention_heads=decoder["hidden_size"] // decoder["head_size"],
        num_key_value_heads=decoder["num_key_value_heads"],
        max_position_embeddings=engine["context_length"],
        eos_token_id=engine["eos_token_id"] or None,
        pad_token_id=engine["pad_token_id"],
    )
    return ORTModelForCausalLM.from_pretrained(folder, config=config)


def main(folder: Path, num_tokens: int, prompts: list[str]) -> None:
    """Print the continued prompts, one JSON string per line."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left")
    model = load(folder)
    # The mask distinguishes padding from tokens, so any token can serve as padding.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    mask = inputs.attention_mask
    tokens = model.generate(inputs.input_ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    for row, seen in zip(tokens, mask, strict=True):
        print(json.dumps(tokenizer.decode(row[int((seen == 0).sum()) :])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
