"""The plan of a benchmark of models: one model, its candidates, and prefill and decode at some lengths."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.config import AnyModel
from diffdeploy.formats import Device
from diffdeploy.graphs import DType
from diffdeploy.records import Record

__all__ = ["NEW_TOKENS", "ModelCandidate", "ModelPlan", "ModelSize", "What", "opened"]

What = Literal["prefill", "decode"]


@cache
def opened(path: Path) -> Bundle:
    """Open a bundle, whose digests are checked once per process."""
    return open_bundle(path)


# Number of tokens that a sample of decoding generates: few, so that the length of the past stays about the same.
NEW_TOKENS = 8


class ModelSize(Record):
    """Prefill of a number of tokens, or decoding after a past of that length.

    Attributes:
        what: ``prefill`` or ``decode``.
        batch_size: number of rows.
        length: number of tokens in each prompt, or in each past.
    """

    what: What
    batch_size: int
    length: int

    @property
    def id(self) -> str:
        """Name, such as ``prefill-B1-S512`` or ``decode-B1-P4096``."""
        return f"{self.what}-B{self.batch_size}-{'S' if self.what == 'prefill' else 'P'}{self.length}"

    @property
    def new_tokens(self) -> int:
        """Number of tokens per row that a sample computes."""
        return self.length if self.what == "prefill" else NEW_TOKENS

    @property
    def total_length(self) -> int:
        """Length of the longest sequence in a sample."""
        return self.length if self.what == "prefill" else self.length + NEW_TOKENS


class ModelCandidate(Record):
    """One way to run the model.

    Attributes:
        name: name in tables, and for choosing the baseline.
        kind: a bundle, the eager model of this library, or transformers' own.
        choice: format of a bundle, implementation of the eager model's operator, or that of attention in transformers.
        path: path of a bundle, or of the checkpoint that transformers reads.
    """

    name: str
    kind: Literal["bundle", "eager", "transformers"]
    choice: str
    path: Path | None = None


class ModelPlan(Record):
    """Everything that the measuring process needs.

    Attributes:
        config: config of the model.
        bundle: bundle with the weights of the model.
        dtype: dtype of weights and caches.
        device: ``cpu`` or ``cuda``.
        threads: number of threads of every candidate.
        sizes: sizes in the order in which they are measured.
        candidates: candidates with different names.
        baseline: name of the candidate that ratios refer to.
        rounds: number of rounds per size; by default as many as `timing.num_rounds` allows.
        seed: random seed for tokens and order.
    """

    config: Annotated[AnyModel, Field(discriminator="version")]
    bundle: Path
    dtype: DType
    device: Device
    threads: int
    sizes: tuple[ModelSize, ...]
    candidates: tuple[ModelCandidate, ...]
    baseline: str
    rounds: int | None = None
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(size.total_length for size in self.sizes)
