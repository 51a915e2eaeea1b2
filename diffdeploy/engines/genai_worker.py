"""The process that runs onnxruntime-genai for a verification; its arguments are the request and answer files."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.engines.base import EngineRequest, EngineRound, EngineRow, log_softmax
from diffdeploy.formats.onnx.genai import GENAI_CONFIG

__all__ = ["main"]


def main(request_file: Path, answer_file: Path) -> None:
    """Run a request and write its rounds."""
    import onnxruntime_genai

    request = EngineRequest.model_validate_json(request_file.read_bytes())
    model = onnxruntime_genai.Model(request.model)
    alone = [row for prompt in request.prompts for row in _generate(model, [prompt], request)]
    rounds = [
        EngineRound(name="alone", rows=alone),
        EngineRound(name="batched", rows=_generate(model, request.prompts, request)),
    ]
    answer_file.write_text(json.dumps([each.model_dump() for each in rounds]), encoding="utf-8")


def _generate(model: Any, prompts: list[list[int]], request: EngineRequest) -> list[EngineRow]:
    """Generate new tokens for a batch, with their log-probabilities."""
    import onnxruntime_genai

    longest = max(map(len, prompts))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + request.max_new_tokens, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    fill = json.loads((Path(request.model) / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["pad_token_id"]
    # If this token ends a row, the engine treats it as padding.
    generator.append_tokens(np.array([[*prompt, *[fill] * (longest - len(prompt))] for prompt in prompts], np.int32))
    tokens: list[list[int]] = [[] for _ in prompts]
    numbers: list[list[dict[int, float]]] = [[] for _ in prompts]
    for _ in range(request.max_new_tokens):
        logits = np.asarray(generator.get_logits(), dtype=np.float64)[:, -1]
        generator.generate_next_token()
        chosen = generator.get_next_tokens()
        for row, (token, of_row) in enumerate(zip(chosen, logits, strict=True)):
            tokens[row].append(int(token))
            numbers[row].append(_most_probable(of_row, request.num_logprobs))
    return [EngineRow(tokens=each, logprobs=its) for each, its in zip(tokens, numbers, strict=True)]


def _most_probable(logits_V: Array, count: int) -> dict[int, float]:
    logprobs = log_softmax(logits_V)
    return {int(token): float(logprobs[token]) for token in np.argsort(-logprobs)[:count]}


if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(Path(sys.argv[1]), Path(sys.argv[2]))
