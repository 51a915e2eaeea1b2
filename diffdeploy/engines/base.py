"""Interface of an engine for a verification: the models it runs, the versions it was tested with, and its answers."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from diffdeploy.arrays import Array
from diffdeploy.bundle import Quantisation
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import UnavailableError
from diffdeploy.graphs import DType
from diffdeploy.processes import WorkerProcess
from diffdeploy.records import Record
from diffdeploy.versions import installed_versions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Engine", "EngineRequest", "EngineRound", "EngineRow", "Subject", "answer_of", "log_softmax"]


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities for logits ``[..., V]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, as an engine runs it.

    Attributes:
        config: config of the decoder.
        weights: canonical weights, in the dtypes in which the engine reads them.
        dtype: dtype in which the engine computes.
        max_length: longest sequence.
        padding: token that the engine treats as padding wherever it occurs; ``None`` if there is none.
        quantisation: quantisation of the matrices, if the engine quantises activations, too.
    """

    config: DecoderConfig
    weights: "Mapping[str, Tensor]"
    dtype: DType
    max_length: int
    padding: int | None = None
    quantisation: Quantisation | None = None


class EngineRequest(Record):
    """A request to an engine.

    Attributes:
        model: directory of the model.
        dtype: dtype to compute in.
        prompts: prompts of several lengths, as token ids; they form one batch.
        max_new_tokens: number of tokens to generate greedily after each prompt; no token ends a row.
        num_logprobs: number of most probable tokens at each position whose log-probabilities are returned.
        max_length: longest sequence.
        tensor_parallel_size: number of devices, or processes, that share each layer.
    """

    model: str
    dtype: DType
    prompts: list[list[int]]
    max_new_tokens: int
    num_logprobs: int
    max_length: int
    tensor_parallel_size: int = 1


class EngineRow(Record):
    """The result for one prompt.

    Attributes:
        tokens: new tokens.
        logprobs: natural logarithms of probabilities by token, at each new token.
        prompt_logprobs: natural logarithms of probabilities by token, at each token of the prompt except the first;
            empty if they were not requested.
        num_cached_tokens: number of the prompt's tokens that the engine had in a cache from an earlier prompt.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float]] = Field(default_factory=list)
    num_cached_tokens: int = 0


class EngineRound(Record):
    """The results of running all prompts once.

    Attributes:
        name: distinguishing feature of the round, for reports.
        rows: results in the order of the prompts.
    """

    name: str
    rows: list[EngineRow]


def answer_of(
    module: str, request: EngineRequest, environment: Mapping[str, str] | None = None
) -> tuple[bytes | None, list[str]]:
    """Run an engine in a process of its own; return its answer (``None`` if it failed) and the lines of its log.

    Args:
        module: module of diffdeploy whose arguments are the files of the request and of the answer.
        request: request to the engine.
        environment: environment variables for the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        with WorkerProcess(module, [str(asked), str(answered)], environment=environment) as process:
            said = process.said()
        return (answered.read_bytes() if answered.is_file() else None), said


class Engine(ABC):
    """An engine that a verification can run.

    Attributes:
        name: name for ``--engine``.
        extra: extra of diffdeploy that installs it.
        distributions: names of the distributions that can provide it.
        tested: versions that were tested, each with the conditions of its tests.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    tested: ClassVar[Mapping[str, str]]

    @property
    def version(self) -> str | None:
        """The installed version; ``None`` if it is not installed."""
        found = next(iter(installed_versions(self.distributions).values()), None)
        # The part after the plus sign describes the build.
        return None if found is None else found.partition("+")[0]

    def why_not(self) -> str | None:
        """Reason why it cannot be used on this machine, in one sentence; ``None`` if it can."""
        if self.version is None:
            return f"{self.name} is not installed; pip install 'diffdeploy[{self.extra}]'"
        if self.version not in self.tested:
            return (
                f"{self.name} {self.version} is installed, but differential attention was tested with "
                f"{', '.join(self.tested)}; install one of these versions"
            )
        return None

    def require_usable(self) -> None:
        """Check that it can be used on this machine.

        Raises:
            UnavailableError: it cannot be used.
        """
        if reason := self.why_not():
            raise UnavailableError(reason)

    @abstractmethod
    def open(self, path: Path) -> Subject:
        """Open the model in a directory, as this engine would run it.

        Raises:
            InputError: the engine cannot run the directory.
        """

    @abstractmethod
    def run(self, request: EngineRequest) -> list[EngineRound]:
        """Run the engine in a separate process.

        Raises:
            InputError: the engine cannot run the model as requested; the message says what it can run.
            DiffDeployError: the engine failed.
        """
