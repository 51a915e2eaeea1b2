"""What a benchmark of models measures: one model, the ways to run it, and prefill and decode at some lengths."""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.config import AnyModel
from diffdeploy.graphs import DType
from diffdeploy.records import Record

__all__ = ["NEW_TOKENS", "ModelCandidate", "ModelPlan", "ModelSize", "What", "opened"]

What = Literal["prefill", "decode"]


@cache
def opened(path: Path) -> Bundle:
    """A bundle whose digests are checked once in a process."""
    return open_bundle(path)


# Tokens that a sample of decoding generates, one after the other: few, so that the past stays about what it is called.
NEW_TOKENS = 8


class ModelSize(Record):
    """Prefill of so many tokens, or decoding behind as many.

    Attributes:
        what: which of them.
        batch_size: rows.
        length: tokens of each prompt, or of each past.
    """

    what: What
    batch_size: int
    length: int

    @property
    def id(self) -> str:
        """Such as ``prefill-B1-S512`` or ``decode-B1-P4096``."""
        return f"{self.what}-B{self.batch_size}-{'S' if self.what == 'prefill' else 'P'}{self.length}"

    @property
    def new_tokens(self) -> int:
        """Tokens of a row that a sample computes."""
        return self.length if self.what == "prefill" else NEW_TOKENS

    @property
    def total_length(self) -> int:
        """Longest sequence of a sample."""
        return self.length if self.what == "prefill" else self.length + NEW_TOKENS


class ModelCandidate(Record):
    """One way to run the model.

    Attributes:
        name: in tables, and for choosing the baseline.
        kind: a bundle, the eager model of this library, or transformers' own.
        choice: format of a bundle, implementation of the eager model's operator, or attention of transformers.
        path: of a bundle, or of the checkpoint that transformers reads.
    """

    name: str
    kind: Literal["bundle", "eager", "transformers"]
    choice: str
    path: Path | None = None


class ModelPlan(Record):
    """Everything that the measuring process needs to know.

    Attributes:
        config: of the model.
        bundle: that holds it, whose weights count.
        dtype: of weights and caches.
        threads: of every candidate.
        sizes: in the order in which they are measured.
        candidates: with different names.
        baseline: name of the candidate that ratios refer to.
        rounds: per size; by default as many as `timing.num_rounds` finds room for.
        seed: of tokens and order.
    """

    config: Annotated[AnyModel, Field(discriminator="version")]
    bundle: Path
    dtype: DType
    threads: int
    sizes: tuple[ModelSize, ...]
    candidates: tuple[ModelCandidate, ...]
    baseline: str
    rounds: int | None = None
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return max(size.total_length for size in self.sizes)
