"""Choice of the next token from logits, with the options of Hugging Face's ``generate``.

Shape suffixes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options for choosing the next token.

    Attributes:
        do_sample: true to draw the token, false to take the most probable one.
        temperature: divisor of the logits, above 0.
        top_k: number of most probable tokens to draw from; 0 or ``None`` for all.
        top_p: total probability, in ``(0, 1]``, that the most probable tokens to draw from must reach.
        repetition_penalty: divisor of the positive logits of tokens that already occur, and factor of negative ones
            (arXiv 1909.05858, section 4.1); 1 for none.
        seed: random seed for the draws; ``None`` for a different one each time.

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
            raise InputError(f"temperature is {self.temperature}; accepted: a number above 0")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; accepted: 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; accepted: above 0, and at most 1")
        if not (np.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; accepted: a number above 0")

    def generator(self) -> np.random.Generator:
        """Random number generator for the draws of one call."""
        return np.random.default_rng(self.seed)

    def choose(self, logits_BV: Array, seen_BV: Array, forbidden: Array, draws: np.random.Generator) -> Array:
        """Choose the next token of each row, ``[B]`` int64.

        Args:
            logits_BV: logits of the last position, any floating dtype.
            seen_BV: boolean, true for tokens that already occur in the row.
            forbidden: tokens that may not be chosen now.
            draws: random number generator, see `generator`.
        """
        scores = self.scores(logits_BV, seen_BV, forbidden)
        if not self.do_sample:
            return np.asarray(scores.argmax(axis=1), np.int64)
        return np.array([draws.choice(len(row), p=row) for row in _softmax(scores)], np.int64)

    def scores(self, logits_BV: Array, seen_BV: Array, forbidden: Array) -> Array:
        """Logits ``[B, V]`` in fp64 after all options, in the order of Hugging Face's processors; see `choose`.

        Tokens that cannot be drawn get minus infinity.
        """
        scores = logits_BV.astype(np.float64)
        if self.repetition_penalty != 1:
            penalised = np.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
            scores = np.where(seen_BV, penalised, scores)
        scores[:, forbidden] = -np.inf
        if not self.do_sample:
            return scores
        scores /= self.temperature
        if self.top_k:
            # Tokens with the same logit as the last of these are kept, too.
            last = -min(self.top_k, scores.shape[1])
            scores[scores < np.partition(scores, last, axis=1)[:, last, None]] = -np.inf
        if self.top_p is not None:
            for row, chances in zip(scores, _softmax(scores), strict=True):
                order = np.argsort(-chances, kind="stable")
                # The first token that reaches the bound is included.
                row[order[int(np.searchsorted(np.cumsum(chances[order]), self.top_p)) + 1 :]] = -np.inf
        return scores


def _softmax(scores_BV: Array) -> Array:
    chances = np.exp(scores_BV - scores_BV.max(axis=1, keepdims=True))
    return np.asarray(chances / chances.sum(axis=1, keepdims=True))
