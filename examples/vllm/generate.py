"""Generate text with vLLM and diffdeploy's plugin: python generate.py DIRECTORY PROMPT NUM_TOKENS.

DIRECTORY is what `diffdeploy convert CHECKPOINT --to diffllama -o DIRECTORY` wrote, or any DiffLlama checkpoint.
"""

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Generate the text; this is a function, since vLLM starts processes that import this file."""
    folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Without the last argument, vLLM takes 92% of the memory for its cache.
    model = LLM(folder, dtype="float32", max_model_len=256, kv_cache_memory_bytes=2**28)
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    print(prompt + model.generate([prompt], greedy)[0].outputs[0].text)


if __name__ == "__main__":
    main()
