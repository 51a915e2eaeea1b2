"""The process that runs vLLM for a verification; its arguments are the request and answer files."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from diffdeploy.engines.base import EngineRequest, EngineRound, EngineRow

__all__ = ["main"]

# Short, so that prompts span several chunks and the second round finds whole blocks in the cache.
_CHUNK, _BLOCK = 16, 32
_LEAST_CACHE_BYTES = 2**28


def main(request_file: Path, answer_file: Path) -> None:
    """Run a request, and write a pair: the reason for a refusal, or ``null``, and the rounds."""
    request = EngineRequest.model_validate_json(request_file.read_bytes())
    refused = _refusal(request)
    rounds = [] if refused is not None else _rounds(request)
    answer = [refused, [each.model_dump() for each in rounds]]
    answer_file.write_text(json.dumps(answer), encoding="utf-8")


def _refusal(request: EngineRequest) -> str | None:
    """Reason why this machine's backend does not support the model; vLLM itself would fail with a log message only."""
    from vllm.platforms import current_platform

    config = json.loads((Path(request.model) / "config.json").read_text(encoding="utf-8"))
    heads, ranks = config["num_attention_heads"], request.tensor_parallel_size
    if (heads // 2) % ranks:
        return (
            f"--tensor-parallel-size is {ranks}, but a pair of streams must be on one rank; accepted: divisors of "
            f"{heads // 2}, the heads of the model"
        )
    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = 2 * (config.get("head_dim") or config["hidden_size"] // heads)
    accepted = CPUAttentionBackend.get_supported_head_sizes()
    if width in accepted:
        return None
    return (
        f"{request.model} has streams of width {width // 2}, so heads of {width} in vLLM's cache, but its CPU backend "
        f"has kernels for {', '.join(map(str, accepted))}"
    )


def _rounds(request: EngineRequest) -> list[EngineRound]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request.model,
        dtype=request.dtype,
        tensor_parallel_size=request.tensor_parallel_size,
        max_model_len=request.max_length,
        # Prompts and answers are token ids, so the checkpoint needs no tokenizer.
        skip_tokenizer_init=True,
        max_logprobs=request.num_logprobs,
        max_num_batched_tokens=_CHUNK,
        max_num_seqs=len(request.prompts),
        block_size=_BLOCK,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=max(_LEAST_CACHE_BYTES, _cache_bytes(request)),
        seed=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
    rounds = []
    # If log-probabilities of a prompt are requested, vLLM computes all of it and does not use its cache.
    for name, of_prompt in (("batched", request.num_logprobs), ("cached prefix", None)):
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            ignore_eos=True,
            logprobs=request.num_logprobs,
            prompt_logprobs=of_prompt,
        )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        rounds.append(EngineRound(name=name, rows=[_row(output) for output in outputs]))
    return rounds


def _cache_bytes(request: EngineRequest) -> int:
    """Size of all sequences at their maximum length, in whole blocks, times two."""
    config = json.loads((Path(request.model) / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    # Keys and values of each key/value stream, with at most 4 bytes per number.
    streams = config.get("num_key_value_heads") or heads
    of_token = 2 * 4 * width * streams * config["num_hidden_layers"]
    return 2 * int(of_token) * len(request.prompts) * (request.max_length + _BLOCK)


def _row(output: Any) -> EngineRow:
    (completion,) = output.outputs
    # Nothing precedes the first token of a prompt.
    of_prompt = [step for step in output.prompt_logprobs or [] if step is not None]
    return EngineRow(
        tokens=list(completion.token_ids),
        logprobs=[_numbers(step) for step in completion.logprobs],
        prompt_logprobs=[_numbers(step) for step in of_prompt],
        num_cached_tokens=output.num_cached_tokens or 0,
    )


def _numbers(step: Any) -> dict[int, float]:
    return {int(token): float(entry.logprob) for token, entry in step.items()}


# vLLM starts processes that import this module again.
if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(Path(sys.argv[1]), Path(sys.argv[2]))
