"""Locating the guilty stage of an artifact that shows only outputs, by inputs whose outputs few stages can affect.

The output projection is a matrix, so the normalised heads can be recovered from outputs; the norm preserves directions,
so the differential heads are known except for their lengths. Then:

- a single position attends only to itself, whatever its query and key are, which leaves values, norm and output
  projection;
- a linear map from the exact heads to the outputs that fits every token is another output projection;
- heads that are correct except for factors of channels, or of halves of a head, indicate the norm;
- heads in the plane of both exact attentions indicate lambda;
- a query in the null space of a head's weights turns its attentions into plain averages; a key in that null space has
  the same weight however large its token is;
- a query in the null space of one stream's weights does not affect the other stream.

Queries and keys affect outputs only through their product: a change of both that keeps their row spaces (reordered rows
of a head, a factor) cannot be distinguished from a change of the attention, unless a cache shows the keys.
"""

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import ExportError
from diffdeploy.graphs import Stage
from diffdeploy.locate.finding import Finding
from diffdeploy.locate.narrow import narrow_verdict
from diffdeploy.locate.probing import EQUATIONS, INVERTED, MOST, TINY, Answer, Prober, Runs, null_spaces

__all__ = ["by_probes"]

_Verdict = tuple[Stage | None, str]

# The first position attends only to itself and shows nothing about queries and keys; the others mix two or three keys.
_LENGTH, _PAST = 3, 2

# Number of tolerances that a fitted lambda may be off by; in correct blocks, it was off by less than 0.01 of one.
_LAMBDA_ROUNDINGS = 2.0

# One lambda explains all heads if nearly all individual ratios are this close to the median. With one lambda, correct
# or not, 99 of 100 were within 0.0004; if each attention is normalised separately, half were off by a tenth.
_SPREAD, _SPREAD_SHARE = 0.05, 0.9
# Lambda may be near 0, where a relative error is meaningless.
_SMALLEST_LAMBDA = 0.01

# Swapped streams gave 1 / lambda within 1e-6; for other wrong lambdas, the product with the correct one differed from 1
# by at least 0.27.
_RECIPROCAL = 0.05

# Share of the elements that factors from medians must explain: correct ones explained all, wrong ones at most 57 %.
_MOST_FACTORS = 0.95


def by_probes(bundle: Bundle, artifact: Runs) -> Finding:
    """Name the stage that explains the artifact's outputs for a few dozen chosen inputs."""
    try:
        with np.errstate(all="ignore"):  # outputs of the artifact may be 0, infinite or NaN
            stage, detail = _verdict(Prober(bundle, artifact))
    except (ExportError, np.linalg.LinAlgError) as error:
        stage, detail = None, f"probes do not run: {error}"
    return Finding(stage=stage, found_by="probes", detail=detail)


def _verdict(prober: Prober) -> _Verdict:
    # The cache comes first, since it shows keys and values without inverting anything.
    if prober.has_cache and (found := _cache(prober)):
        return found
    if not prober.shows_heads:
        return narrow_verdict(prober)
    if found := _lambda(prober):
        return found
    if not prober.ask(prober.tokens(1)).right:
        return _behind_attention(prober)
    if not prober.ask(TINY * prober.tokens(1)).right:
        return Stage.NORM, "single positions are correct, but not where the norm's epsilon has an effect"
    return _attention(prober)


def _cache(prober: Prober) -> _Verdict | None:
    """Verdict from the keys and values in the cache, which are not rotated at position 0."""
    x = prober.tokens(_LENGTH)
    position = 0 if prober.takes_positions else None
    still, turned = (prober.ask(x, position=p, past_length=_PAST) for p in (position, None))
    for name in ("present.key", "present.value"):
        if not prober.same(turned.given[name][:, :, :_PAST], turned.wanted(name)[:, :, :_PAST]):
            return Stage.CACHE, f"{name} does not contain the given past"
    new = [
        (answer.given[n][:, :, _PAST:], answer.wanted(n)[:, :, _PAST:])
        for answer, n in ((turned, "present.value"), (still, "present.key"), (turned, "present.key"))
    ]
    values, keys, turned_keys = new
    if turned.right and not all(prober.same(*side) for side in (values, turned_keys)):
        return Stage.CACHE, "outputs are correct, but the returned cache of new tokens is not"
    if not prober.same(*keys):
        turned_only = prober.config.rope is not None and prober.same(*(_pair_lengths(prober, side) for side in keys))
        stage = Stage.ROPE if turned_only else Stage.K_PROJECTION
        return stage, "present.key is wrong at position 0, where nothing is rotated"
    if not prober.same(*turned_keys):
        return Stage.ROPE, "present.key is correct at position 0, but wrong elsewhere"
    if not prober.same(*values):
        return Stage.V_PROJECTION, "present.value contains other values"
    return None


def _pair_lengths(prober: Prober, keys_BHTw: Array) -> Array:
    """Lengths of the channel pairs of each stream in a cached head, which a rotation preserves."""
    assert prober.config.rope is not None
    half = prober.config.rope.width(prober.config.head_dim) // 2
    interleaved = prober.config.rope.style == "interleaved"
    streams = keys_BHTw.reshape(*keys_BHTw.shape[:-1], -1, prober.config.head_dim)
    turned, kept = streams[..., : 2 * half], streams[..., 2 * half :]
    grid = turned.reshape(*turned.shape[:-1], *((half, 2) if interleaved else (2, half)))
    lengths: Array = np.linalg.norm(grid, axis=-1 if interleaved else -2)
    return np.concatenate((lengths, kept), axis=-1)


def _lambda(prober: Prober) -> _Verdict | None:
    """Verdict from the plane of signal and noise: the lambda with which all heads lie in it, or ``None``."""
    if not prober.config.constant_lambda:
        return None
    answer = prober.ask(prober.tokens(_LENGTH))
    # At the first position both attentions are equal, and span no plane.
    given = prober.directions(answer.given["output"])[:, :, 1:].reshape(-1, prober.config.value_dim)
    signal, noise, weighted = (
        answer.stage(s)[:, :, 1:].reshape(given.shape) for s in (Stage.SIGNAL, Stage.NOISE, Stage.LAMBDA)
    )
    factors = np.stack(
        [np.linalg.lstsq(np.stack((s, n), 1), g, rcond=None)[0] for s, n, g in zip(signal, noise, given, strict=True)]
    )
    if not prober.same(factors[:, :1] * signal + factors[:, 1:] * noise, given, slack=INVERTED):
        return None
    # Computed from the weighted values, so that it is the rounded lambda that the formula used.
    expected = float(np.median((weighted * noise).sum(-1) / np.square(noise).sum(-1)))
    ratios = -factors[:, 1] / factors[:, 0]
    found = float(np.median(ratios))
    if abs(found - expected) <= _LAMBDA_ROUNDINGS * prober.tolerance * (1 + abs(expected)):
        return None
    if np.mean(np.abs(ratios - found) < _SPREAD * (abs(found) + _SMALLEST_LAMBDA)) < _SPREAD_SHARE:
        return Stage.DIFFERENCE, "heads lie between signal and noise, but with more than one lambda"
    if abs(found * expected - 1) < _RECIPROCAL and float(np.median(factors[:, 0])) < 0.0:
        return Stage.SIGNAL, "the streams are swapped: the signal is subtracted"
    return Stage.LAMBDA, f"heads are signal - {found:.5g} noise, but the correct lambda is {expected:.5g}"


def _behind_attention(prober: Prober) -> _Verdict:
    """Verdict if single positions are wrong: values, norm or output projection."""
    width = prober.config.num_heads * prober.config.value_dim
    answers = [
        prober.ask(prober.tokens(_LENGTH)) for _ in range(-(-EQUATIONS * width // (prober.batch_size * _LENGTH)))
    ]
    changes_heads = prober.config.has_head_step
    if changes_heads and _is_norm(prober, answers):
        return Stage.NORM, "heads are correct except for factors of channels or halves"
    last = Stage.NORM if changes_heads else Stage.DIFFERENCE
    heads = np.concatenate([a.stage(last).transpose(0, 2, 1, 3).reshape(-1, width) for a in answers])
    # Another output projection may also have another bias.
    heads = np.concatenate((heads, np.ones((len(heads), 1))), axis=1)
    outputs = np.concatenate([a.given["output"].reshape(-1, prober.config.embed_dim) for a in answers])
    if prober.same(heads @ np.linalg.lstsq(heads, outputs, rcond=None)[0], outputs, share=MOST):
        return Stage.OUTPUT_PROJECTION, "another matrix explains every output"
    what = "single positions are wrong, and neither norm nor output projection explains it"
    if prober.has_cache:
        return Stage.SIGNAL, f"{what}; the values in the cache are correct"
    return Stage.V_PROJECTION, what


def _is_norm(prober: Prober, answers: list[Answer]) -> bool:
    """True if normalised heads are the exact differences, times one factor per half and one per channel."""
    width = prober.config.value_dim
    shape = (-1, 2, width // 2) if width % 2 == 0 else (-1, 1, width)
    given = np.concatenate([prober.heads(answer.given["output"]).reshape(shape) for answer in answers])
    exact = np.concatenate([answer.stage(Stage.DIFFERENCE).reshape(shape) for answer in answers])
    ratios = given / exact
    if not np.isfinite(ratios).all():
        return False
    halves = np.median(ratios, axis=-1, keepdims=True)
    channels = np.median(ratios / halves, axis=0, keepdims=True)
    # Repeated without the channel factors that the first medians still included.
    halves = np.median(ratios / channels, axis=-1, keepdims=True)
    return prober.same(halves * channels * exact, given, slack=INVERTED, share=_MOST_FACTORS)


def _attention(prober: Prober) -> _Verdict:
    """Verdict if single positions are correct: queries, keys, rotary embedding or the attentions."""
    if prober.ask(prober.tokens(_LENGTH)).right:
        return Stage.SIGNAL, "3 positions without padding are correct; the fault is in which keys are visible"
    if _seen_from_null_space(prober, "q"):
        return Stage.Q_PROJECTION, "tokens that the query weights map to 0 do not give plain averages"
    if _seen_from_null_space(prober, "k"):
        return Stage.K_PROJECTION, "a token that the key weights map to 0 still has an effect as a key"
    right = [_is_right_alone(prober, stream) for stream in (0, 1)]
    if right == [True, False]:
        return Stage.NOISE, "outputs are correct where the noise is a plain average"
    if right == [False, True]:
        return Stage.SIGNAL, "outputs are correct where the signal is a plain average"
    if prober.config.rope is not None and _is_right_without_distance(prober):
        return Stage.ROPE, "outputs are correct where distances between positions have no effect"
    return Stage.SIGNAL, "both attentions are wrong, and neither projections nor positions explain it"


def _bases(prober: Prober, side: str) -> Array | None:
    """Basis of the null space of each head's rows of ``q_proj`` or ``k_proj``; ``None`` with a bias or a norm."""
    config = prober.config
    if config.streams_share_keys or f"{side}_proj.bias" in prober.weights or config.qk_norm_eps:
        return None
    heads = config.num_heads if side == "q" else config.num_kv_heads
    return null_spaces(prober.weights[f"{side}_proj.weight"].reshape(heads, -1, config.embed_dim))


def _seen_from_null_space(prober: Prober, side: str) -> bool:
    """True if some head of the artifact sees tokens that its weights map to 0.

    With such a query, the exact head is a plain average; with such a key, the mixture of two positions depends only on
    the other key, and stays the same when the token is doubled.
    """
    bases = _bases(prober, side)
    if bases is None:
        return False
    group = prober.config.num_heads // prober.config.num_kv_heads
    for number, basis in enumerate(bases):
        if side == "q":
            x = prober.tokens(_LENGTH)
            x[:, -1] = prober.tokens_in(basis)
            answer = prober.ask(x)
            given, wanted = (
                prober.heads(output)[:, number, -1] for output in (answer.given["output"], answer.wanted("output"))
            )
        else:
            x = prober.tokens(2)
            x[:, 0] = prober.tokens_in(basis)
            heads = slice(number * group, (number + 1) * group)
            # Doubling the token doubles any key that its weights see, and so changes the mixture.
            given, wanted = (_mixture(prober, x * np.array([factor, 1.0])[:, None], heads) for factor in (1.0, 2.0))
        if not prober.same(given, wanted, slack=INVERTED):
            return True
    return False


def _mixture(prober: Prober, x_BSD: Array, heads: slice) -> Array:
    """Angle ``[B, g]`` by which the last of two positions mixes their values."""
    answer = prober.ask(x_BSD)
    given = prober.directions(answer.given["output"])[:, heads, -1]
    values = answer.stage(Stage.V_PROJECTION)[:, heads.start * prober.config.num_kv_heads // prober.config.num_heads]
    mixed = np.stack([np.linalg.lstsq(v.T, g.T, rcond=None)[0] for v, g in zip(values, given, strict=True)])
    angles: Array = np.arctan2(mixed[:, 0], mixed[:, 1])
    return angles


def _is_right_alone(prober: Prober, stream: int) -> bool:
    """True if outputs are correct where the other stream's queries are 0 and its attention is a plain average."""
    if _bases(prober, "q") is None:
        return False
    config = prober.config
    rows = prober.weights["q_proj.weight"].reshape(config.num_heads, 2, -1, config.embed_dim)[:, 1 - stream]
    bases = null_spaces(rows.reshape(1, -1, config.embed_dim))
    if bases is None:
        return False
    x = prober.tokens(_LENGTH)
    x[:, -1] = prober.tokens_in(bases[0])
    answer = prober.ask(x)
    return prober.same(answer.given["output"][:, -1], answer.wanted("output")[:, -1])


def _is_right_without_distance(prober: Prober) -> bool:
    """True if outputs are correct where all positions are equal, or the only key is at the query's own position."""
    if prober.takes_positions:
        return prober.ask(prober.tokens(_LENGTH), position=0).right
    if _bases(prober, "k") is None:
        return False
    bases = null_spaces(prober.weights["k_proj.weight"][None])
    if bases is None:
        return False
    x = prober.tokens(2)
    x[:, 0] = prober.tokens_in(bases[0])
    return prober.ask(x).right
