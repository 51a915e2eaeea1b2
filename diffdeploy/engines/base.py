"""What an engine is to a verification: which models it runs, in which versions it was tested, and what it answers."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from diffdeploy.arrays import Array
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
    """Natural logarithms of probabilities, of logits ``[..., V]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model as an engine runs it.

    Attributes:
        config: of the decoder.
        weights: canonical weights, in the dtypes in which the engine reads them.
        dtype: that the engine computes in.
        max_length: longest sequence.
        padding: the token that the engine takes for padding wherever it stands; ``None`` where there is none.
    """

    config: DecoderConfig
    weights: "Mapping[str, Tensor]"
    dtype: DType
    max_length: int
    padding: int | None = None


class EngineRequest(Record):
    """What an engine is asked for.

    Attributes:
        model: the directory.
        dtype: to compute in.
        prompts: tokens, of several lengths; they come as one batch.
        max_new_tokens: that follow each prompt, the most probable ones; no token ends a row.
        num_logprobs: log-probabilities of so many tokens at each position, the most probable ones.
        max_length: longest sequence.
        tensor_parallel_size: devices, or processes, that share each layer.
    """

    model: str
    dtype: DType
    prompts: list[list[int]]
    max_new_tokens: int
    num_logprobs: int
    max_length: int
    tensor_parallel_size: int = 1


class EngineRow(Record):
    """What came of one prompt.

    Attributes:
        tokens: new ones.
        logprobs: at each new token, natural logarithms of probabilities by token.
        prompt_logprobs: the same at each token of the prompt but the first; empty where they were not asked for.
        num_cached_tokens: of the prompt, that the engine had in a cache from an earlier one.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float]] = Field(default_factory=list)
    num_cached_tokens: int = 0


class EngineRound(Record):
    """All prompts once.

    Attributes:
        name: what is special about it, in reports.
        rows: in the order of the prompts.
    """

    name: str
    rows: list[EngineRow]


def answer_of(
    module: str, request: EngineRequest, environment: Mapping[str, str] | None = None
) -> tuple[bytes | None, list[str]]:
    """What a process answers that runs an engine, ``None`` where it did not, and the lines that it said.

    Args:
        module: of diffdeploy, whose arguments are the files of the request and of the answer.
        request: what is asked for.
        environment: variables that are set for the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(request.model_dump_json(), encoding="utf-8")
        with WorkerProcess(module, [str(asked), str(answered)], environment=environment) as process:
            said = process.said()
        return (answered.read_bytes() if answered.is_file() else None), said


class Engine(ABC):
    """An engine that a verification runs.

    Attributes:
        name: for ``--engine``.
        extra: of diffdeploy, that installs it.
        distributions: names under which it is installed, one of them.
        tested: versions that it was tested with, and where.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    tested: ClassVar[Mapping[str, str]]

    @property
    def version(self) -> str | None:
        """The installed version; ``None`` where there is none."""
        found = next(iter(installed_versions(self.distributions).values()), None)
        # What stands behind the plus sign says how it was built.
        return None if found is None else found.partition("+")[0]

    def why_not(self) -> str | None:
        """Why it cannot be used on this machine, in one sentence; ``None`` where it can."""
        if self.version is None:
            return f"{self.name} is not installed; pip install 'diffdeploy[{self.extra}]'"
        if self.version not in self.tested:
            return (
                f"{self.name} {self.version} is installed, and differential attention was tested with "
                f"{', '.join(self.tested)}; install one of these versions"
            )
        return None

    def require_usable(self) -> None:
        """See that it can be used on this machine.

        Raises:
            UnavailableError: it cannot.
        """
        if reason := self.why_not():
            raise UnavailableError(reason)

    @abstractmethod
    def open(self, path: Path) -> Subject:
        """The model in a directory, as this engine will run it.

        Raises:
            InputError: the engine does not run such directories.
        """

    @abstractmethod
    def run(self, request: EngineRequest) -> list[EngineRound]:
        """Run the engine, in a process of its own.

        Raises:
            InputError: it cannot run such a model, or not in this way; the message says what it can.
            DiffDeployError: it did not run.
        """
