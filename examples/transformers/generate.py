"""Generate text from a model bundle with transformers' generate(): python generate.py MODEL PROMPT NUM_TOKENS.

The bundle may have any format.
"""

import sys

from transformers import AutoTokenizer

from diffdeploy.integrations.transformers import DiffDeployForCausalLM

folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = DiffDeployForCausalLM.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=num_tokens)
print(tokenizer.decode(tokens[0]))
