"""Generate text from an ONNX model bundle with onnxruntime-genai: python generate.py MODEL PROMPT NUM_TOKENS.

A bundle can be used as a model directory of onnxruntime-genai unchanged. Pad batches on the right.
"""

import sys

import onnxruntime_genai as genai
from tokenizers import Tokenizer

folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
ids = tokenizer.encode(prompt).ids

model = genai.Model(folder)
parameters = genai.GeneratorParams(model)
parameters.set_search_options(batch_size=1, max_length=len(ids) + num_tokens, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens([ids])
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
