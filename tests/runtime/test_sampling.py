"""Scores of the next token against the processors of transformers, in their order."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diffdeploy.runtime.sampling import Sampling

ROWS, VOCABULARY, EOS = 5, 40, [3, 7]


def processors(options: dict[str, Any], min_new_tokens: int) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if "repetition_penalty" in options:
        found.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    found.append(MinNewTokensLengthLogitsProcessor(6, min_new_tokens, EOS))
    if options.get("do_sample"):
        found.append(TemperatureLogitsWarper(options.get("temperature", 1.0)))
        found += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
        found += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    return found


@pytest.mark.parametrize("min_new_tokens", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.5, "do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 6},
        {"do_sample": True, "top_k": 99},
        {"do_sample": True, "top_p": 0.6, "temperature": 1.3},
        {"do_sample": True, "top_k": 12, "top_p": 0.4, "repetition_penalty": 1.2, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_scores_are_those_of_transformers(options: dict[str, Any], min_new_tokens: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * 3
    if ties:
        # As half precision has them; at the bound of top_p transformers takes any of a tie.
        logits = logits.round() + (0 if "top_p" not in options else torch.arange(VOCABULARY) * 1e-3)
    tokens = torch.randint(0, VOCABULARY, (ROWS, 8), generator=generator)
    expected = processors(options, min_new_tokens)(tokens, logits.clone()).numpy()
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, tokens.numpy(), True, axis=1)
    forbidden = np.array(EOS if min_new_tokens > 2 else [], np.int64)
    found = Sampling(**options).scores(logits.numpy(), seen, forbidden)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    sampling, draws = Sampling(do_sample=True, seed=1, top_k=3), np.random.default_rng(1)
    nothing = np.zeros((1, 4), bool), np.array([], np.int64)
    drawn = [int(sampling.choose(logits, *nothing, draws)[0]) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    expected = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    # Five standard deviations of a share.
    assert (np.abs(shares - expected) <= 5 * math.sqrt(0.25 / 4000)).all()
    assert shares[3] == 0
