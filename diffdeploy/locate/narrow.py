"""Probes of blocks whose outputs are narrower than their joined heads, so that heads cannot be recovered from outputs.

They try the possible faults of single stages, and check which of them explains the outputs.

Shape suffixes: B batch, S positions, H heads, e value width, D model width.
"""

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import Stage
from diffdeploy.locate.probing import EQUATIONS, MOST, TINY, Answer, Prober

__all__ = ["narrow_verdict"]

_Verdict = tuple[Stage | None, str]

_LENGTH = 3

# Grid with steps of 0.05. Correct lambdas lie between 0 and 1 or slightly above; the range also includes negated ones
# and, since swapped streams invert lambda, the inverses of lambdas of at least 1/3.
_LARGEST_LAMBDA, _GRID = 3.0, 121

# All refinement steps together cover 3 steps of the grid; the last one is 1e-12 wide, below all rounding.
_REFINEMENTS, _SHRINK = 60, 1.5

# Heads of tokens of this size have squares near 4,000, where even an epsilon outside of the root changes less than
# rounding does.
_LARGE = 64.0

# Number of tolerances that an explanation may be off by. Correct explanations were off by up to half of it. Of the
# faults that no explanation fits, the closest one, noise of 1e-4 on the outputs, was off by 1.1 times this number.
_EXPLAINED = 4.0


def narrow_verdict(prober: Prober) -> _Verdict:
    """Stage that explains the outputs, among those that can be distinguished here."""
    if found := _lambda(prober):
        return found
    alone = prober.tokens(1)
    if prober.ask(alone).right and prober.ask(TINY * alone).right:
        return None, "outputs are narrower than the heads, and show only that values and norm are correct"
    if prober.ask(_LARGE * alone).right:
        return Stage.NORM, "single positions are correct where the norm's epsilon has no effect"
    answers = [prober.ask(prober.tokens(_LENGTH)) for _ in range(_num_answers(prober))]
    outputs = np.concatenate([answer.given["output"].reshape(-1, prober.config.embed_dim) for answer in answers])
    joined = np.concatenate([_joined(prober, answer) for answer in answers])
    # The norm comes first: it has fewer unknowns, and another matrix would explain its faults as well.
    if _is_explained(prober, _by_channel(prober, joined), outputs.reshape(-1)):
        return Stage.NORM, "another weight of the norm explains every output"
    if all(_is_explained(prober, joined, column) for column in outputs.T):
        return Stage.OUTPUT_PROJECTION, "another matrix explains every output"
    return Stage.V_PROJECTION, "single positions are wrong, and neither norm nor output projection explains it"


def _num_answers(prober: Prober) -> int:
    return -(-EQUATIONS * prober.config.num_heads * prober.config.value_dim // (prober.batch_size * _LENGTH))


def _joined(prober: Prober, answer: Answer) -> Array:
    """Exact joined heads ``[B S, H e]``."""
    last = Stage.NORM if prober.config.has_head_step else Stage.DIFFERENCE
    heads_BHSe = answer.stage(last)
    joined: Array = heads_BHSe.transpose(0, 2, 1, 3).reshape(-1, heads_BHSe.shape[1] * heads_BHSe.shape[3])
    return joined


def _by_channel(prober: Prober, joined: Array) -> Array:
    """Contribution of each channel, over all heads, to each output: ``[B S D, e]``."""
    heads, width = prober.config.num_heads, prober.config.value_dim
    weight_DHe = prober.weights["out_proj.weight"].reshape(-1, heads, width)
    parts: Array = np.einsum("nhe,dhe->nde", joined.reshape(-1, heads, width), weight_DHe)
    return parts.reshape(-1, width)


def _is_explained(prober: Prober, features: Array, outputs: Array) -> bool:
    with_bias = np.concatenate((features, np.ones((len(features), 1))), axis=1)
    explained = with_bias @ np.linalg.lstsq(with_bias, outputs, rcond=None)[0]
    return prober.same(explained, outputs, slack=_EXPLAINED, share=MOST)


def _lambda(prober: Prober) -> _Verdict | None:
    """Verdict if one other lambda explains the outputs, or ``None``."""
    if not prober.config.constant_lambda:
        return None
    eps, output_scale = prober.config.norm_eps, prober.config.output_scale
    answer = prober.ask(prober.tokens(_LENGTH))
    given = answer.given["output"]

    def outputs(lam: float) -> Array:
        heads = answer.stage(Stage.SIGNAL) - lam * answer.stage(Stage.NOISE)
        if eps is not None:
            heads = heads / np.sqrt(np.mean(np.square(heads), axis=-1, keepdims=True) + eps)
        heads = heads * prober.weights.get("subln.weight", 1.0) * output_scale
        joined = heads.transpose(0, 2, 1, 3).reshape(*given.shape[:2], -1)
        result: Array = joined @ prober.weights["out_proj.weight"].T + prober.weights.get("out_proj.bias", 0.0)
        return result

    def error(lam: float) -> float:
        return float(np.mean(np.square(outputs(lam) - given)))

    grid = np.linspace(-_LARGEST_LAMBDA, _LARGEST_LAMBDA, _GRID)
    middle, step = float(min(grid, key=error)), float(grid[1] - grid[0])
    for _ in range(_REFINEMENTS):
        middle, step = min((middle - step, middle, middle + step), key=error), step / _SHRINK
    weighted, noise = answer.stage(Stage.LAMBDA), answer.stage(Stage.NOISE)
    expected = float(np.median((weighted * noise).sum(-1) / np.square(noise).sum(-1)))
    if prober.same(outputs(middle), given) and abs(middle - expected) > prober.tolerance:
        return Stage.LAMBDA, f"lambda {middle:.5g} explains the outputs, but the correct one is {expected:.5g}"
    return None
