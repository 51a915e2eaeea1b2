"""The numbers that cases are made of: hidden states as models have them, masks of rows that differ, positions.

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

# With these a right computation in half precision may overflow on the way to a finite result.
EXTREME_KINDS: tuple[Kind, ...] = ("large", "offset", "outliers", "heavy", "scaled", "scales", "nan", "infinity")

_SIGMAS = {"tiny": 1e-3, "large": 8.0}
# Language models have a few channels that are hundreds to thousands of times as large as the others (arXiv 2208.07339);
# their keys have some that are tens of times as large.
_OUTLIERS, _CHANNELS_PER_OUTLIER = (100.0, 2000.0), 64
_OUTLIERS_OF_THE_PAST = (10.0, 100.0)
# From below the square root of every norm's epsilon to where float16 ends.
_SCALES = (1e-6, 1e4)
_SCALES_OF_THE_PAST = (1e-3, 30.0)
_DEGREES_OF_FREEDOM = 2.0
_OFFSET = 4.0
# Different tokens of a sequence that repeats them.
_DISTINCT_TOKENS = 3
# Below the largest float16, which is the smallest of all largest numbers.
_LARGEST = 6e4


def draw_states(kind: Kind, generator: np.random.Generator, batch_size: int, length: int, width: int) -> Array:
    """Hidden states ``[B, S, D]``, float32, in the way of a kind; see `Case`."""
    num_tokens = 1 if kind == "constant" else length
    # Drawn in float32 and rounded later, so that every dtype is tried on the same numbers.
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
        # One number of one token, in the first row: all other rows must stay as they are.
        place = 0, generator.integers(length), generator.integers(width)
        x[place] = np.nan if kind == "nan" else np.inf
    return x


def draw_ids(kind: Kind, generator: np.random.Generator, batch_size: int, length: int, num_tokens: int) -> Array:
    """Token ids ``[B, S]``, int64, out of ``num_tokens``: any, one alone (``constant``), or a few (``repeated``)."""
    shape = (batch_size, 1 if kind == "constant" else length)
    ids: Array = generator.integers(0, num_tokens, shape)
    if kind == "repeated":
        places: Array = generator.integers(0, min(_DISTINCT_TOKENS, length), shape)
        ids = np.take_along_axis(ids, places, axis=1)
    return np.ascontiguousarray(np.broadcast_to(ids, (batch_size, length)))


def draw_past(kind: Kind, generator: np.random.Generator, shape: tuple[int, int, int, int]) -> Array:
    """Keys or values of the past ``[B, H, P, width]``, float32, beside hidden states of that kind."""
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
    """``[B, S]``, ``True`` for a part of the tokens that differs from row to row, from one of them to nearly all."""
    shares = np.linspace(0.0, 0.9, batch_size) if batch_size > 1 else np.full(1, 0.5)
    some: Array = generator.random((batch_size, length)) < shares[:, None]
    if length:
        some[np.arange(batch_size), generator.integers(0, length, batch_size)] = True
    return some


def _outliers(generator: np.random.Generator, width: int, factors: tuple[float, float]) -> Array:
    """``[D]``: 1, and in a few channels a large factor; the same in every row, as models have them."""
    channels = generator.choice(width, max(1, width // _CHANNELS_PER_OUTLIER), replace=False)
    scale = np.ones(width, dtype=np.float32)
    scale[channels] = np.exp(generator.uniform(np.log(factors[0]), np.log(factors[1]), len(channels)))
    return scale


def _scales(generator: np.random.Generator, count: int, ends: tuple[float, float]) -> Array:
    """Log-uniform scales, one of each of ``count`` equal parts of the range, in random order."""
    low, high = np.log(ends)
    # In equal parts, so that few rows leave no gap as wide as chance would.
    places = (generator.permutation(count) + generator.random(count)) / max(1, count)
    scales: Array = np.exp(low + places * (high - low)).astype(np.float32)
    return scales


def draw_tokens(mask: Mask, generator: np.random.Generator, batch_size: int, total: int) -> Array:
    """The mask ``[B, T]``, int64, 1 for tokens; ``mixed`` differs from row to row, others pad the last row alone."""
    tokens = np.ones((batch_size, total), dtype=np.int64)
    half = max(1, total // 2)
    if mask == "left":
        tokens[-1, :half] = 0
    elif mask == "right":
        tokens[-1, total - half :] = 0
    elif mask == "ragged":
        # The first token too, so that under causality the first query sees nothing.
        tokens[-1, ::3] = 0
    elif mask == "hidden":
        tokens[-1] = 0
    elif mask == "mixed":
        for row, pattern in enumerate(_patterns(generator, batch_size)):
            _hide(tokens[row], *pattern, generator)
    return tokens


def counted_positions(tokens_BT: Array, past_length: int = 0) -> Array:
    """Position ids ``[B, S]`` of what stands behind a past, as generation counts them: padding takes no position.

    The runtime counts by itself: it is what is tried.
    """
    counted = np.maximum(tokens_BT.cumsum(axis=1) - 1, 0)
    return np.ascontiguousarray(counted[:, past_length:])


def prompt_inputs(spec: GraphSpec, input_ids_BS: Array, attention_mask_BS: Array | None = None) -> dict[str, Array]:
    """Inputs of a model by the names of its graph: prompts, and nothing before them.

    Args:
        spec: interface of the graph.
        input_ids_BS: int64.
        attention_mask_BS: int64; ``None`` for tokens alone.
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
    """A mask with as many tokens in each row, side by side from the first of them on, or as late as they fit."""
    counts, total = tokens_BT.sum(1), tokens_BT.shape[1]
    first = np.minimum(tokens_BT.argmax(1), total - counts)[:, None]
    places = np.arange(total)
    tokens: Array = ((places >= first) & (places < first + counts[:, None])).astype(np.int64)
    return tokens


_PLACES = ("left", "right", "holes")
_COUNTS = ("one", "few", "half", "most", "all but one", "all")


def _patterns(generator: np.random.Generator, batch_size: int) -> list[tuple[str, str]]:
    """Where tokens are hidden and how many, for each row; all combinations come before one comes again."""
    everything = [(place, count) for count in _COUNTS for place in _PLACES]
    order = generator.permutation(len(everything))
    return [everything[order[row % len(order)]] for row in range(batch_size)]


def _hide(tokens_T: Array, place: str, count: str, generator: np.random.Generator) -> None:
    total = len(tokens_T)
    shares = {"one": 1, "few": total // 8, "half": total // 2, "most": (7 * total) // 8, "all but one": total - 1}
    # Of a single token, all is what there is to hide.
    num_hidden = min(total, max(1, shares.get(count, total)))
    if place == "left":
        tokens_T[:num_hidden] = 0
    elif place == "right":
        tokens_T[total - num_hidden :] = 0
    else:
        tokens_T[generator.choice(total, num_hidden, replace=False)] = 0
