"""Check of generated tokens: each must be the most probable one, wherever the exact margin is large enough to tell.

Shape suffixes: B batch, N tokens, S prompt, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.errors import DiffDeployError
from diffdeploy.formats import Check
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case
from diffdeploy.verify.metrics import measure
from diffdeploy.verify.values import prompt_inputs
from diffdeploy.verify.worker import Artifact
from diffdeploy.verify.yardsticks import Yardsticks

__all__ = ["Greedy", "greedy_tokens", "wrong_tokens"]

_PROMPT, _NEW_TOKENS = 9, 16
_NAME = "greedy tokens"


class Greedy(NamedTuple):
    """The verdict on generated tokens.

    Attributes:
        check: check that passes if all tokens that can be judged are correct.
        num_checked: number of tokens whose exact margin exceeds twice the allowed error of a logit.
    """

    check: Check
    num_checked: int


def wrong_tokens(exact_NV: Array, tokens_N: Array, allowed: float) -> tuple[Array, int]:
    """Find the tokens that cannot be the most probable ones, and count those that can be judged.

    Args:
        exact_NV: exact logits or log-probabilities from which each token was chosen.
        tokens_N: the chosen tokens.
        allowed: allowed error of each value in ``exact_NV``; two values may be off in opposite directions.

    Returns:
        Indices of the wrong tokens, and the number of tokens whose margin exceeds twice the allowed error.
    """
    second, first = np.sort(exact_NV, axis=-1)[:, -2:].T
    lost = first - exact_NV[np.arange(len(tokens_N)), tokens_N]
    return np.flatnonzero(lost > 2 * allowed), int((first - second > 2 * allowed).sum())


def greedy_tokens(artifact: Artifact, yardsticks: Yardsticks, spec: GraphSpec, seed: int) -> Greedy:
    """Let the artifact continue a padded batch of prompts on its own, and compare every token with the formula.

    Args:
        artifact: object that runs a model.
        yardsticks: yardsticks of the model.
        spec: interface of the graph.
        seed: random seed for the prompts.
    """
    longest = spec.axes["total_sequence_length"].max
    length = min(_PROMPT, longest - 1)
    new = min(_NEW_TOKENS, longest - length)
    case = Case(batch_size=min(3, spec.axes["batch_size"].max), sequence_length=length, mask="left", seed=seed)
    inputs = case.inputs(spec)
    try:
        tokens = artifact.generate(inputs, new)
    except DiffDeployError as error:
        return Greedy(Check(name=_NAME, passed=False, detail=f"the artifact did not run: {error}"), 0)
    if tokens.shape != (case.batch_size, length + new) or (tokens[:, :length] != inputs["input_ids"]).any():
        return Greedy(
            Check(name=_NAME, passed=False, detail=f"it returned {list(tokens.shape)}, not prompts and {new} tokens"), 0
        )
    # The last token was never fed to the model.
    mask = np.concatenate((inputs["attention_mask"], np.ones((len(tokens), new - 1), np.int64)), axis=1)
    yardstick = yardsticks.of_logits(prompt_inputs(spec, tokens[:, :-1], mask))
    allowed = measure(spec.main_output, yardstick.rounded, yardstick).allowed_max_error
    if allowed is None:
        return Greedy(Check(name=_NAME, passed=False, detail="there is no yardstick for their logits"), 0)
    exact = yardstick.expected[:, length - 1 :].reshape(-1, yardstick.expected.shape[2])
    wrong, checked = wrong_tokens(exact, tokens[:, length:].reshape(-1), allowed)
    total = new * len(tokens)
    if len(wrong):
        row, step = divmod(int(wrong[0]), new)
        detail = f"{len(wrong)} of {total} are not the most probable ones, first in row {row} token {step}"
        return Greedy(Check(name=_NAME, passed=False, detail=detail), checked)
    detail = f"{checked} of {total} have a margin that is large enough to tell, and all of these are correct"
    return Greedy(Check(name=_NAME, passed=True, detail=detail), checked)
