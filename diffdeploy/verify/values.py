"""The numbers in cases: hidden states like those of models, masks that differ between rows, and positions.

Shape suffixes: B batch, S query length, T key length, D width.
"""

from typing import Literal

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import GraphSpec

__all__ = [
    "EXTREME_KINDS",
    "Kind",
    "Mask",
    "counted_positions",
    "draw_ids",
    "draw_past",
    "draw_states",
    "draw_tokens",
    "prompt_inputs",
    "without_holes",
]

Kind = Literal[
    "normal",
    "tiny",
    "large",
    "constant",
    "zeros",
    "repeated",
    "offset",
    "outliers",
    "heavy",
    "scaled",
    "scales",
    "nan",
    "infinity",
]
Mask = Literal["none", "left", "right", "ragged", "hidden", "mixed"]

# Kinds for which a correct computation in half precision may overflow on the way to a finite result.
EXTREME_KINDS: tuple[Kind, ...] = ("large", "offset", "outliers", "heavy", "scaled", "scales", "nan", "infinity")

_SIGMAS = {"tiny": 1e-3, "large": 8.0}
# Language models have a few channels that are hundreds to thousands of times as large as the others (arXiv 2208.07339);
# their keys have some that are tens of times as large.
_OUTLIERS, _CHANNELS_PER_OUTLIER = (100.0, 2000.0), 64
_OUTLIERS_OF_THE_PAST = (10.0, 100.0)
# Range of scales: from below the square root of every norm's epsilon to the upper end of float16.
_SCALES = (1e-6, 1e4)
_SCALES_OF_THE_PAST = (1e-3, 30.0)
_DEGREES_OF_FREEDOM = 2.0
_OFFSET = 4.0
# Number of different tokens in a sequence that repeats them.
_DISTINCT_TOKENS = 3
# Maximum magnitude, below the largest number in float16, which is the smallest maximum among the dtypes.
_LARGEST = 6e4


def draw_states(kind: Kind, generator: np.random.Generator, batch_size: int, length: int, width: int) -> Array:
    """Draw hidden states ``[B, S, D]``, float32, of a kind; see `Case`."""
    num_tokens = 1 if kind == "constant" else length
    # Drawn in float32 and rounded later, so that every dtype is tried with the same numbers.
    x: Array = generator.standard_normal((batch_size, num_tokens, width), dtype=np.float32)
    if kind in _SIGMAS:
        x *= _SIGMAS[kind]
    if kind == "zeros":
        x[_some_tokens(generator, batch_size, length)] = 0.0
    elif kind == "repeated":
        x = np.take_along_axis(x, generator.integers(0, min(_DISTINCT_TOKENS, length), (batch_size, length, 1)), axis=1)
    elif kind == "offset":
        x += generator.standard_normal(width, dtype=np.float32) * _OFFSET + _OFFSET
    elif kind == "outliers":
        x *= _outliers(generator, width, _OUTLIERS)
    elif kind == "heavy":
        x = np.asarray(generator.standard_t(_DEGREES_OF_FREEDOM, x.shape), dtype=np.float32)
    elif kind == "scaled":
        x *= _scales(generator, batch_size, _SCALES)[:, None, None]
    elif kind == "scales":
        x *= _scales(generator, batch_size * length, _SCALES).reshape(batch_size, length, 1)
    x = np.clip(np.repeat(x, length // num_tokens, axis=1), -_LARGEST, _LARGEST)
    if kind in ("nan", "infinity"):
        # One number of one token in the first row; all other rows must stay unchanged.
        place = 0, generator.integers(length), generator.integers(width)
        x[place] = np.nan if kind == "nan" else np.inf
    return x


def draw_ids(kind: Kind, generator: np.random.Generator, batch_size: int, length: int, num_tokens: int) -> Array:
    """Draw token ids ``[B, S]``, int64, below ``num_tokens``: any, one (``constant``), or a few (``repeated``)."""
    shape = (batch_size, 1 if kind == "constant" else length)
    ids: Array = generator.integers(0, num_tokens, shape)
    if kind == "repeated":
        places: Array = generator.integers(0, min(_DISTINCT_TOKENS, length), shape)
        ids = np.take_along_axis(ids, places, axis=1)
    return np.ascontiguousarray(np.broadcast_to(ids, (batch_size, length)))


def draw_past(kind: Kind, generator: np.random.Generator, shape: tuple[int, int, int, int]) -> Array:
    """Draw keys or values of the past ``[B, H, P, width]``, float32, to go with hidden states of that kind."""
    batch_size, _, length, width = shape
    past: Array = generator.standard_normal(shape, dtype=np.float32)
    if kind == "zeros":
        past[np.broadcast_to(_some_tokens(generator, batch_size, length)[:, None], shape[:3])] = 0.0
    elif kind == "offset":
        past += generator.standard_normal(width, dtype=np.float32)
    elif kind == "outliers":
        past *= _outliers(generator, width, _OUTLIERS_OF_THE_PAST)
    elif kind == "heavy":
        past = np.asarray(generator.standard_t(_DEGREES_OF_FREEDOM, shape), dtype=np.float32)
    elif kind == "scaled":
        past *= _scales(generator, batch_size, _SCALES_OF_THE_PAST)[:, None, None, None]
    return np.clip(past, -_LARGEST, _LARGEST)


def _some_tokens(generator: np.random.Generator, batch_size: int, length: int) -> Array:
    """Boolean ``[B, S]``, ``True`` for some tokens: different ones in each row, from a single one to nearly all."""
    shares = np.linspace(0.0, 0.9, batch_size) if batch_size > 1 else np.full(1, 0.5)
    some: Array = generator.random((batch_size, length)) < shares[:, None]
    if length:
        some[np.arange(batch_size), generator.integers(0, length, batch_size)] = True
    return some


def _outliers(generator: np.random.Generator, width: int, factors: tuple[float, float]) -> Array:
    """Factors ``[D]``: large in a few channels and 1 elsewhere; the same in every row, as in models."""
    channels = generator.choice(width, max(1, width // _CHANNELS_PER_OUTLIER), replace=False)
    scale = np.ones(width, dtype=np.float32)
    scale[channels] = np.exp(generator.uniform(np.log(factors[0]), np.log(factors[1]), len(channels)))
    return scale


def _scales(generator: np.random.Generator, count: int, ends: tuple[float, float]) -> Array:
    """Log-uniform scales, one from each of ``count`` equal parts of the range, in random order."""
    low, high = np.log(ends)
    # With one scale from each part, gaps are narrower than those that chance would leave among few rows.
    places = (generator.permutation(count) + generator.random(count)) / max(1, count)
    scales: Array = np.exp(low + places * (high - low)).astype(np.float32)
    return scales


def draw_tokens(mask: Mask, generator: np.random.Generator, batch_size: int, total: int) -> Array:
    """Draw the mask ``[B, T]``, int64, 1 for tokens; ``mixed`` differs between rows, others pad only the last row."""
    tokens = np.ones((batch_size, total), dtype=np.int64)
    half = max(1, total // 2)
    if mask == "left":
        tokens[-1, :half] = 0
    elif mask == "right":
        tokens[-1, total - half :] = 0
    elif mask == "ragged":
        # The first token is hidden, too, so that the first causal query is fully masked.
        tokens[-1, ::3] = 0
    elif mask == "hidden":
        tokens[-1] = 0
    elif mask == "mixed":
        for row, pattern in enumerate(_patterns(generator, batch_size)):
            _hide(tokens[row], *pattern, generator)
    return tokens


def counted_positions(tokens_BT: Array, past_length: int = 0) -> Array:
    """Position ids ``[B, S]`` after a past, counted as in generation: padding does not count as a position.

    The runtime's own count is under test, so it is not used here.
    """
    counted = np.maximum(tokens_BT.cumsum(axis=1) - 1, 0)
    return np.ascontiguousarray(counted[:, past_length:])


def prompt_inputs(spec: GraphSpec, input_ids_BS: Array, attention_mask_BS: Array | None = None) -> dict[str, Array]:
    """Inputs of a model by the names of its graph, for prompts without a past.

    Args:
        spec: interface of the graph.
        input_ids_BS: token ids, int64.
        attention_mask_BS: mask, int64; ``None`` for no padding.
    """
    mask = np.ones_like(input_ids_BS) if attention_mask_BS is None else attention_mask_BS
    inputs = {"input_ids": np.ascontiguousarray(input_ids_BS), "attention_mask": mask}
    if "position_ids" in spec.inputs:
        inputs["position_ids"] = counted_positions(mask)
    for name in spec.caches:
        _, heads, _, width = spec.inputs[name].shape
        inputs[name] = np.zeros((len(mask), int(heads), 0, int(width)), spec.inputs[name].dtype)
    return inputs


def without_holes(tokens_BT: Array) -> Array:
    """Make the tokens of each row contiguous without changing their number.

    They begin at the first token of the row, or further left if they would not fit.
    """
    counts, total = tokens_BT.sum(1), tokens_BT.shape[1]
    first = np.minimum(tokens_BT.argmax(1), total - counts)[:, None]
    places = np.arange(total)
    tokens: Array = ((places >= first) & (places < first + counts[:, None])).astype(np.int64)
    return tokens


_PLACES = ("left", "right", "holes")
_COUNTS = ("one", "few", "half", "most", "all but one", "all")


def _patterns(generator: np.random.Generator, batch_size: int) -> list[tuple[str, str]]:
    """Place and number of hidden tokens for each row; all combinations occur before one is repeated."""
    everything = [(place, count) for count in _COUNTS for place in _PLACES]
    order = generator.permutation(len(everything))
    return [everything[order[row % len(order)]] for row in range(batch_size)]


def _hide(tokens_T: Array, place: str, count: str, generator: np.random.Generator) -> None:
    total = len(tokens_T)
    shares = {"one": 1, "few": total // 8, "half": total // 2, "most": (7 * total) // 8, "all but one": total - 1}
    # With a single token, the only choice is to hide it.
    num_hidden = min(total, max(1, shares.get(count, total)))
    if place == "left":
        tokens_T[:num_hidden] = 0
    elif place == "right":
        tokens_T[total - num_hidden :] = 0
    else:
        tokens_T[generator.choice(total, num_hidden, replace=False)] = 0
