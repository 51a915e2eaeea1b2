"""From logits to the next token, in the terms of Hugging Face's ``generate``.

Shape suffixes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: draw it; else it is the most probable one.
        temperature: what logits are divided by, above 0.
        top_k: draw from so many of the most probable tokens; 0 or ``None`` for all.
        top_p: draw from the most probable tokens that together have at least this probability, of ``(0, 1]``.
        repetition_penalty: what positive logits of tokens that are there already are divided by, and negative ones
            multiplied (arXiv 1909.05858, section 4.1); 1 for none.
        seed: of the draws; ``None`` for another one each time.

    Raises:
        InputError: a number is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature is {self.temperature}; accepted is a number above 0")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; accepted is 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; accepted is above 0, and at most 1")
        if not (np.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; accepted is a number above 0")

    def generator(self) -> np.random.Generator:
        """What the tokens of one call are drawn with."""
        return np.random.default_rng(self.seed)

    def choose(self, logits_BV: Array, before: list[Array], forbidden: Array, draws: np.random.Generator) -> Array:
        """The next token of each row, ``[B]`` int64.

        Args:
            logits_BV: of the last position, any floating dtype.
            before: tokens of each row so far, for the penalty.
            forbidden: tokens that may not come now.
            draws: see `generator`.
        """
        scores = logits_BV.astype(np.float64)
        if self.repetition_penalty != 1:
            for row, tokens in zip(scores, before, strict=True):
                seen = np.unique(tokens)
                row[seen] = np.where(
                    row[seen] > 0, row[seen] / self.repetition_penalty, row[seen] * self.repetition_penalty
                )
        scores[:, forbidden] = -np.inf
        if not self.do_sample:
            return np.asarray(scores.argmax(axis=1), np.int64)
        return np.array([self._drawn(row, draws) for row in scores / self.temperature], np.int64)

    def _drawn(self, scores_V: Array, draws: np.random.Generator) -> int:
        order = np.argsort(-scores_V, kind="stable")[: self.top_k or None]
        likely = np.exp(scores_V[order] - scores_V[order[0]])
        likely /= likely.sum()
        if self.top_p is not None:
            # The first token that reaches the bound is one of them.
            kept = int(np.searchsorted(np.cumsum(likely), self.top_p)) + 1
            order, likely = order[:kept], likely[:kept] / likely[:kept].sum()
        return int(draws.choice(order, p=likely))
