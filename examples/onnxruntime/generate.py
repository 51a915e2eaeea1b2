"""Generate text from an ONNX model bundle with onnxruntime alone: python generate.py MODEL PROMPT NUM_TOKENS."""

import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
caches = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
past = {node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32) for node in caches}
tokens = new = tokenizer.encode(prompt).ids
for _ in range(num_tokens):
    mask = np.ones((1, len(tokens)), np.int64)
    positions = np.arange(len(tokens) - len(new), len(tokens))[None]
    feed = {"input_ids": np.array([new]), "attention_mask": mask, "position_ids": positions, **past}
    logits, *present = session.run(None, feed)
    past = dict(zip(past, present, strict=True))
    new = [int(logits[0, -1].argmax())]
    tokens = [*tokens, *new]
print(tokenizer.decode(tokens))
