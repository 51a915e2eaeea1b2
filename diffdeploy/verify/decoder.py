"""The formula of a whole decoder in numpy fp64, one layer at a time, and the exact outputs of any graph.

Shape suffixes: B batch, S new tokens, D model width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat, starmap
from typing import NamedTuple

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Quantisation
from diffdeploy.config import POLYNORM_EPS, AnyModel, DecoderConfig, LayerConfig, MlpConfig
from diffdeploy.graphs import DType, GraphSpec, clear_padding
from diffdeploy.processes import return_freed_memory
from diffdeploy.verify.activations import rounded_activations
from diffdeploy.verify.oracle import oracle, times, with_stored_streams
from diffdeploy.verify.threads import blas_threads_shared

__all__ = [
    "ExactOutput",
    "below",
    "exact_embedding",
    "exact_head",
    "exact_layer",
    "exact_outputs",
    "exact_ways",
    "inputs_of_layer",
    "logits_of",
]

# Rows of the head that are widened at once: all of them in float64 would take hundreds of megabytes.
_TOKENS_AT_ONCE = 4096
# The exponential of a large negative gate overflows, which makes the result 0; the criterion checks for infinity.
_QUIETLY = np.errstate(over="ignore", invalid="ignore")


def exact_outputs(
    config: AnyModel,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    spec: GraphSpec,
    quantisation: Quantisation | None = None,
) -> dict[str, Array]:
    """Exact outputs of a graph, by the formula of a block or of a decoder.

    Args:
        config: config of the block or the decoder.
        weights: canonical weights, any floating dtype.
        inputs: inputs by the names of the graph.
        spec: interface of the graph.
        quantisation: quantisation of a decoder's matrices, if it quantises the activations, too.

    Returns:
        float64 arrays by the names of the graph.
    """
    if not isinstance(config, DecoderConfig):
        return oracle(config, weights, inputs)
    outputs = _of_decoder(config, weights, inputs, spec, ((None, quantisation),))
    return {name: exact for name, *(exact,) in outputs}


class ExactOutput(NamedTuple):
    """An output of a decoder, float64.

    name: its name in the graph.
    exact: of float activations.
    stored: of layers that round their streams to a dtype; see `exact_and_stored`.
    quantised: of activations that are quantised; ``None`` if there is no quantisation.
    """

    name: str
    exact: Array
    stored: Array
    quantised: Array | None = None


def exact_ways(
    config: DecoderConfig,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    spec: GraphSpec,
    dtype: DType,
    quantisation: Quantisation | None,
) -> Iterator[ExactOutput]:
    """Each output, exact, with stored streams and, if activations are quantised, with that.

    Caches come first, layer by layer, and can be dropped before the next: three copies of all of them in fp64 would
    take more memory than the model.
    """
    ways: list[tuple[DType | None, Quantisation | None]] = [(None, None), (dtype, None)]
    if quantisation is not None:
        ways.append((None, quantisation))
    # `starmap`, unlike a generator, keeps no output that it has returned.
    return starmap(ExactOutput, _of_decoder(config, weights, inputs, spec, ways))


def logits_of(outputs: Iterator[ExactOutput]) -> ExactOutput:
    """Return the last of the outputs that `exact_ways` yields, and drop the others as they come."""
    return deque(outputs, maxlen=1).pop()


def _of_decoder(
    config: DecoderConfig,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    spec: GraphSpec,
    ways: Sequence[tuple[DType | None, Quantisation | None]],
) -> Iterator[tuple[str, *tuple[Array, ...]]]:
    """Name of each output, and the output in each way: a dtype of stored streams, and a quantisation of activations."""

    def cleared(name: str, arrays: Iterable[Array]) -> tuple[str, *tuple[Array, ...]]:
        arrays = tuple(arrays)
        for array in arrays:
            clear_padding(spec, inputs, name, array)
        return name, *arrays

    dtypes, quantisations = zip(*ways, strict=True)
    blocks = [None if how is None else how.activation_blocks for how in quantisations]
    xs_BSD = [exact_embedding(weights, inputs)] * len(ways)
    # numpy computes most of a layer in one thread, so that several ways take hardly longer than one.
    with blas_threads_shared(len(ways)), ThreadPoolExecutor(len(ways)) as pool:
        own: dict[str, Array] = {}
        for number, layer in enumerate(config.layers):
            # Widened once for all ways, since widening takes as long as computing a few tokens; and into the same
            # memory, since new pages take longer than the numbers in them.
            given = below(weights, f"layers.{number}.")
            own = {name: _room_for(weight, own.get(name)) for name, weight in given.items()}
            list(pool.map(np.copyto, own.values(), given.values()))
            of_layer = partial(exact_layer, layer, config.norm_eps, own)
            computed = list(pool.map(of_layer, xs_BSD, repeat(inputs_of_layer(inputs, number)), dtypes, blocks))
            xs_BSD = [x_BSD for x_BSD, _ in computed]
            for side in ("key", "value"):
                yield cleared(f"present.{number}.{side}", (caches.pop(side) for _, caches in computed))
        own.clear()
    # That of the layers' temporaries, before as much again is needed for the logits.
    return_freed_memory()
    if spec.logits == "last":
        xs_BSD = [x_BSD[:, -1:] for x_BSD in xs_BSD]
    yield cleared(spec.main_output, map(partial(exact_head, config, weights), xs_BSD, quantisations))


def exact_embedding(weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
    """Input of the first layer, ``[B, S, D]``."""
    return np.asarray(weights["embedding.weight"][inputs["input_ids"]], dtype=np.float64)


def inputs_of_layer(inputs: Mapping[str, Array], number: int) -> dict[str, Array]:
    """Inputs of the block of one layer, by the names of a block's graph, without the hidden states."""
    shared = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
    past = {f"past_key_values.{side}": inputs[f"past_key_values.{number}.{side}"] for side in ("key", "value")}
    return {**shared, **past}


@_QUIETLY
def exact_layer(
    config: LayerConfig,
    norm_eps: float,
    weights: Mapping[str, Array],
    x_BSD: Array,
    inputs: Mapping[str, Array],
    stored_as: DType | None = None,
    activation_blocks: int | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Compute one layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        config: config of the layer.
        norm_eps: epsilon of both norms.
        weights: weights of the layer, by their names in it.
        x_BSD: output of the previous layer.
        inputs: see `inputs_of_layer`.
        stored_as: dtype to which the streams are rounded; ``None`` for exact streams.
        activation_blocks: see `times`; only for exact streams.

    Returns:
        Output ``[B, S, D]``, and ``key`` and ``value`` of all tokens, including the past; float64.
    """
    x_BSD = np.asarray(x_BSD, dtype=np.float64)
    given = {"hidden_states": _rms_norm(x_BSD, weights["attention_norm.weight"], norm_eps), **inputs}
    of_block = below(weights, "self_attn.")
    if stored_as is None:
        outputs = oracle(config.attention, of_block, given, activation_blocks=activation_blocks)
    else:
        outputs = with_stored_streams(config.attention, of_block, given, stored_as)
    x_BSD = x_BSD + outputs["output"]
    normed_BSD = _rms_norm(x_BSD, weights["ffn_norm.weight"], norm_eps)
    x_BSD = x_BSD + _mlp(config.mlp, below(weights, "ffn."), normed_BSD, activation_blocks)
    return x_BSD, {side: outputs[f"present.{side}"] for side in ("key", "value")}


@_QUIETLY
def exact_head(
    config: DecoderConfig, weights: Mapping[str, Array], x_BSD: Array, quantisation: Quantisation | None = None
) -> Array:
    """Logits ``[B, S, V]`` from the output of the last layer."""
    normed = _rms_norm(np.asarray(x_BSD, np.float64), weights["norm.weight"], config.norm_eps)
    blocks = quantisation.activation_blocks if quantisation is not None and quantisation.head else None
    if blocks is not None:
        normed = rounded_activations(normed, blocks)
    head = weights[_head_name(config)]
    logits = np.empty((*normed.shape[:-1], len(head)))
    for start in range(0, len(head), _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        logits[..., some] = times(normed, _wide(head[some]))
    return logits


def _head_name(config: DecoderConfig) -> str:
    return "embedding.weight" if config.tied else "lm_head.weight"


def below(weights: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Weights whose names begin with a prefix, by their names without it."""
    # This does not iterate over items, which would read all weights of a lazily read checkpoint.
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def _wide(weight: Array) -> Array:
    return np.asarray(weight, dtype=np.float64)


def _room_for(weight: Array, previous: Array | None) -> Array:
    """Memory for a weight in float64: that of the previous layer, if the shape is the same."""
    return previous if previous is not None and previous.shape == weight.shape else np.empty(weight.shape)


def _rms_norm(x: Array, weight: Array | float, eps: float) -> Array:
    normed: Array = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return normed


def _mlp(config: MlpConfig, w: Mapping[str, Array], x_BSD: Array, activation_blocks: int | None) -> Array:
    def projected(name: str, x: Array) -> Array:
        return times(x, _wide(w[f"{name}_proj.weight"]), activation_blocks) + _bias(w, f"{name}_proj.bias")

    return projected("down", _activation(config, w, projected("gate", x_BSD)) * projected("up", x_BSD))


def _bias(w: Mapping[str, Array], name: str) -> Array | float:
    return _wide(w[name]) if name in w else 0.0


def _activation(config: MlpConfig, w: Mapping[str, Array], gate: Array) -> Array:
    """SiLU, or PolyNorm as in `diffdeploy.modules.mlp.PolyNorm`."""
    if config.kind == "swiglu":
        return np.asarray(gate / (1.0 + np.exp(-gate)))
    cube, square, plain = (float(weight) for weight in _wide(w["act.weight"]))
    parts = ((cube, gate**3), (square, gate**2), (plain, gate))
    total: Array = sum(factor * _rms_norm(power, 1.0, POLYNORM_EPS) for factor, power in parts) + _wide(w["act.bias"])
    return total
