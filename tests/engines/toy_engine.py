"""An engine in one module: the eager model of the house, one prompt at a time, with a place for faults."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from diffdeploy.checkpoints import ModelCheckpoint
from diffdeploy.engines import Engine, EngineRequest, EngineRound, EngineRow, Subject
from diffdeploy.modules import DiffTransformer


class ToyEngine(Engine):
    """Runs a model that is given to it.

    Args:
        found: what the weights say.
        change: makes the weights that it runs of those.
        spoil: makes its answer of a right one.
    """

    name = "toy"
    extra = "test"
    distributions = ("torch",)
    tested: ClassVar[Mapping[str, str]] = {torch.__version__.partition("+")[0]: "wherever these tests run"}

    def __init__(
        self,
        found: ModelCheckpoint,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
        spoil: Callable[[EngineRow], EngineRow] = lambda row: row,
    ) -> None:
        self._found, self._change, self._spoil = found, change, spoil

    def open(self, path: Path) -> Subject:
        return Subject(config=self._found.config, weights=self._found.weights, dtype="float32", max_length=64)

    def run(self, request: EngineRequest) -> list[EngineRound]:
        weights = self._change({name: tensor.clone() for name, tensor in self._found.weights.items()})
        model = DiffTransformer.from_weights(self._found.config, weights, max_positions=64)
        rows = [self._spoil(_continued(model, prompt, request)) for prompt in request.prompts]
        return [EngineRound(name="one by one", rows=rows)]


def _continued(model: DiffTransformer, prompt: list[int], request: EngineRequest) -> EngineRow:
    ids = list(prompt)
    for _ in range(request.max_new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    steps = []
    for position in torch.log_softmax(model(torch.tensor([ids]))[0], dim=-1)[:-1]:
        values, tokens = position.topk(request.num_logprobs)
        steps.append(dict(zip(tokens.tolist(), values.tolist(), strict=True)))
    new = len(prompt)
    return EngineRow(tokens=ids[new:], logprobs=steps[new - 1 :], prompt_logprobs=steps[: new - 1])
