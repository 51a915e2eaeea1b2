"""The blocks' formulas in numpy fp64, straight from the canonical weights, a few rows of one score matrix at a time.

Shape suffixes: B batch, H heads, S query length, P past length, T = P + S key length, D model width, d stream width,
e value width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffdeploy.arrays import Array, epsilon
from diffdeploy.config import AnyConfig, RopeConfig
from diffdeploy.exact import key_head, lambda_of_heads, rope_tables
from diffdeploy.graphs import DType
from diffdeploy.verify.activations import rounded_activations

__all__ = ["exact_and_stored", "oracle", "times", "with_stored_streams"]

Store = Callable[[Array], Array]

# Number of rows of a score matrix in memory at once.
_ROWS = 256


def _rotate(x_HSd: Array, rope: RopeConfig, positions_S: Array) -> Array:
    width = rope.width(x_HSd.shape[-1])
    cos, sin = (table[positions_S] for table in rope_tables(rope, x_HSd.shape[-1], int(positions_S.max()) + 1))
    out = x_HSd.copy()
    evens, odds, lower, upper = slice(0, width, 2), slice(1, width, 2), slice(width // 2), slice(width // 2, width)
    a, b = (evens, odds) if rope.style == "interleaved" else (lower, upper)
    out[..., a] = x_HSd[..., a] * cos - x_HSd[..., b] * sin
    out[..., b] = x_HSd[..., b] * cos + x_HSd[..., a] * sin
    return out


def _hidden(config: AnyConfig, ends_S: Array, tokens_T: Array) -> Array:
    """Boolean ``[S, T]``, ``True`` where a key is hidden; ``ends_S`` are the indices of the queries among the keys."""
    age = ends_S[:, None] - np.arange(len(tokens_T))
    hidden: Array = np.broadcast_to(tokens_T == 0, age.shape)
    if config.causal:
        hidden = hidden | (age < 0)
    if config.sliding_window is not None:
        hidden = hidden | (age >= config.sliding_window)
    return hidden


def _softmax_times(q_Sd: Array, k_Td: Array, v_Te: Array, hidden_ST: Array, scale: float) -> Array:
    scores = q_Sd @ k_Td.T
    # In place from here on, since a block of scores is the largest array of the formula.
    scores *= scale
    scores[hidden_ST] = -np.inf
    # A fully masked row has no largest score, and -inf minus -inf would be NaN. It sums to 0, and returns 0.
    largest = scores.max(axis=1, keepdims=True)
    scores -= np.where(np.isneginf(largest), 0.0, largest)
    np.exp(scores, out=scores)
    total = scores.sum(axis=1, keepdims=True)
    product: Array = _weighted(scores, v_Te, hidden_ST) / np.where(total == 0.0, 1.0, total)
    return product


def _weighted(weights_ST: Array, v_Te: Array, hidden_ST: Array) -> Array:
    """Product of weights and values; NaN and infinity in a hidden token, whose weight is 0, have no effect."""
    finite = np.isfinite(v_Te)
    if finite.all():
        return weights_ST @ v_Te
    product: Array = weights_ST @ np.where(finite, v_Te, 0.0)
    for key in np.flatnonzero(~finite.all(axis=1)):
        sees = ~hidden_ST[:, key]
        product[sees] += np.where(finite[key], 0.0, weights_ST[sees, key, None] * v_Te[key])
    return product


def oracle(
    config: AnyConfig,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    queries: Array | None = None,
    activation_blocks: int | None = None,
) -> dict[str, Array]:
    """Compute differential attention as in arXiv 2410.05258, equations 1 to 3, or as in its second version.

    Args:
        config: config of the block.
        weights: canonical weights, any floating dtype.
        inputs: inputs by the names of the graph: ``hidden_states [B, S, D]`` and, if the variant has them,
            ``attention_mask [B, T]``, ``position_ids [B, S]``, ``past_key_values.key`` and ``past_key_values.value``.
        queries: ascending positions whose output is computed, all by default; they determine the cost.
        activation_blocks: see `times`.

    Returns:
        float64 arrays by the names of the graph: ``output [B, S, D]``, or that of the queries; with a past, also
        ``present.key`` and ``present.value``.
    """
    return _formula(config, weights, inputs, (_as_it_is,), queries, activation_blocks)[0]


def exact_and_stored(
    config: AnyConfig,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    dtype: DType,
    queries: Array | None = None,
) -> tuple[dict[str, Array], list[Array]]:
    """Compute the result of `oracle`, and its ``output`` with streams that are stored in a dtype on the way.

    Where the two streams nearly cancel, merely storing them costs many times the rounding of the result. Every artifact
    stores them, since each is the result of a separate operator. They are stored in two ways, rounded to the nearest
    number and rounded at random. Random rounding is for streams that are almost equal: they have the same nearest
    number here, whereas in an artifact they round to the same number only if both were computed without error.

    Args:
        config: config of the block.
        weights: weights as for `oracle`.
        inputs: inputs as for `oracle`.
        dtype: dtype to which both streams, lambda times the second, and the difference are rounded; all else is exact.
        queries: positions as for `oracle`.

    Returns:
        The exact outputs by name, and ``output`` for each way of storing the streams.
    """
    store = _rounding_to(dtype)
    # A fixed seed, so that repeated verifications give the same figures.
    generator = np.random.default_rng(0)

    def store_at_random(values: Array) -> Array:
        return store(values * (1.0 + epsilon(dtype) * (generator.random(values.shape) - 0.5)))

    exact, *stored = _formula(config, weights, inputs, (_as_it_is, store, store_at_random), queries)
    return exact, [outputs["output"] for outputs in stored]


def with_stored_streams(
    config: AnyConfig, weights: Mapping[str, Array], inputs: Mapping[str, Array], dtype: DType
) -> dict[str, Array]:
    """Compute the result of `oracle` with streams rounded to the nearest number of a dtype; see `exact_and_stored`."""
    return _formula(config, weights, inputs, (_rounding_to(dtype),), None)[0]


def _rounding_to(dtype: DType) -> Store:
    def store(values: Array) -> Array:
        rounded: Array = values.astype(dtype).astype(np.float64)
        return rounded

    return store


def _as_it_is(values: Array) -> Array:
    return values


def _formula(
    config: AnyConfig,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    stores: Sequence[Store],
    queries: Array | None,
    activation_blocks: int | None = None,
) -> list[dict[str, Array]]:
    """Outputs for each way of storing the streams."""
    # These are the artifact's own weights, so that casting them does not count as an error of the artifact.
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # inputs may hold infinity, and the criterion checks results
        x_BSD = np.asarray(inputs["hidden_states"], dtype=np.float64)
        chosen = np.arange(x_BSD.shape[1]) if queries is None else queries
        q_BHSd = _projected(config, w, "q", x_BSD[:, chosen], activation_blocks)
        k_BHSd = _projected(config, w, "k", x_BSD, activation_blocks)
        v_BHSe = _projected(config, w, "v", x_BSD, activation_blocks)
        rows = [
            _sequence(
                config,
                w,
                (q_BHSd[b], k_BHSd[b], v_BHSe[b]),
                {n: array[b] for n, array in inputs.items()},
                stores,
                chosen,
            )
            for b in range(len(x_BSD))
        ]
        joined = np.stack([row.joined for row in rows], axis=1)
        outputs = [
            times(heads, w["out_proj.weight"], activation_blocks) + w.get("out_proj.bias", 0.0) for heads in joined
        ]
    present = {}
    if "past_key_values.key" in inputs:
        present = {f"present.{side}": np.stack([getattr(row, side) for row in rows]) for side in ("key", "value")}
    return [{"output": output, **present} for output in outputs]


def times(x: Array, weight: Array, activation_blocks: int | None = None) -> Array:
    """``x @ weight.T``, as one product: a product for each row of a batch would read the weight again.

    Args:
        x: activations ``[..., K]``.
        weight: matrix ``[N, K]``.
        activation_blocks: size of the blocks in which ``x`` is rounded to int8 first; ``None`` for no rounding.
    """
    if activation_blocks is not None:
        x = rounded_activations(x, activation_blocks)
    product: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    return product.reshape(*x.shape[:-1], len(weight))


def _projected(
    config: AnyConfig, w: Mapping[str, Array], name: str, x_BSD: Array, activation_blocks: int | None
) -> Array:
    """Queries, keys or values ``[B, heads, S, width]``, normalised where the config says so."""
    width = config.value_dim if name == "v" else config.head_dim
    flat = times(x_BSD, w[f"{name}_proj.weight"], activation_blocks) + w.get(f"{name}_proj.bias", 0.0)
    side: Array = np.swapaxes(flat.reshape(*x_BSD.shape[:2], -1, width), 1, 2)
    if config.qk_norm_eps is None or name == "v":
        return side
    size = np.sqrt(np.mean(side**2, axis=-1, keepdims=True) + config.qk_norm_eps)
    normed: Array = side / size * w[f"{name}_norm.weight"]
    return normed


class _Row(NamedTuple):
    """Results of one batch row: the joined heads for each way of storing the streams, keys and values."""

    joined: Array
    key: Array
    value: Array


def _sequence(
    config: AnyConfig,
    w: Mapping[str, Array],
    sides: tuple[Array, Array, Array],
    inputs: Mapping[str, Array],
    stores: Sequence[Store],
    chosen: Array,
) -> _Row:
    """Compute one batch row from its queries, keys and values, and from inputs without their batch axis."""
    q, k, v = sides
    x_SD = np.asarray(inputs["hidden_states"], dtype=np.float64)
    length = len(x_SD)
    past_length = inputs["past_key_values.key"].shape[1] if "past_key_values.key" in inputs else 0
    if config.rope is not None:
        positions = inputs.get("position_ids", np.arange(past_length, past_length + length))
        q, k = _rotate(q, config.rope, positions[chosen]), _rotate(k, config.rope, positions)
    if "past_key_values.key" in inputs:
        k = np.concatenate((_streams(config, inputs["past_key_values.key"].astype(np.float64)), k), axis=1)
        v = np.concatenate((inputs["past_key_values.value"].astype(np.float64), v), axis=1)
    tokens = inputs.get("attention_mask", np.ones(past_length + length))
    joined = np.empty((len(stores), len(chosen), config.num_heads * config.value_dim))
    for start in range(0, len(chosen), _ROWS):
        rows = slice(start, min(start + _ROWS, len(chosen)))
        # Later keys are hidden from a whole block of causal queries.
        num_keys = past_length + (int(chosen[rows.stop - 1]) + 1 if config.causal else length)
        hidden = _hidden(config, past_length + chosen[rows], tokens[:num_keys])
        for i in range(config.num_heads):
            value = v[i // (config.num_heads // config.num_kv_heads), :num_keys]
            signal, noise = (
                _softmax_times(q[2 * i + s, rows], k[key_head(config, i, s), :num_keys], value, hidden, config.scale)
                for s in (0, 1)
            )
            columns = slice(i * config.value_dim, (i + 1) * config.value_dim)
            # The streams are computed once for all ways of storing them, since they account for nearly all of the work.
            for number, store in enumerate(stores):
                joined[number, rows, columns] = _head(
                    config, w, i, store(signal), store(noise), x_SD[chosen[rows]], store
                )
    return _Row(joined, _pairs(config, k), v)


def _streams(config: AnyConfig, pairs_HTw: Array) -> Array:
    """Separate the key heads ``[num_key_streams, T, d]`` of a cache ``[h_kv, T, key_cache_dim]`` with paired keys."""
    return np.concatenate([np.split(pair, pair.shape[1] // config.head_dim, axis=1) for pair in pairs_HTw])


def _pairs(config: AnyConfig, k_HTd: Array) -> Array:
    """Invert `_streams`."""
    side_by_side = [np.concatenate([*streams], axis=1) for streams in np.split(k_HTd, config.num_kv_heads)]
    return np.stack(side_by_side)


def _head(
    config: AnyConfig, w: Mapping[str, Array], i: int, signal: Array, noise: Array, x_SD: Array, store: Store
) -> Array:
    """Combine the two streams of head ``i``."""
    if config.lambda_kind == "token":
        lam_S = 1.0 / (1.0 + np.exp(-x_SD @ w["lambda_proj.weight"][i]))
    else:
        lam_S = np.full(len(x_SD), lambda_of_heads(config, w)[i])
    head = store(signal - store(lam_S[:, None] * noise))
    if config.norm_eps is not None:
        head = head / np.sqrt(np.mean(head**2, axis=1, keepdims=True) + config.norm_eps) * w.get("subln.weight", 1.0)
    return head * config.output_scale
