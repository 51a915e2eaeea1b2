"""`GraphSpec`: names, dtypes, axes and ranges of a deployed graph, which exporters promise and runtimes check."""

from collections.abc import Iterator
from typing import Literal

from diffdeploy.config import AnyConfig, AnyModel, DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.records import Record

__all__ = ["Cache", "DType", "GraphSpec", "Logits", "Padding", "Range", "TensorSpec", "Variant", "graph_spec"]

DType = Literal["float32", "float16", "bfloat16"]
Variant = Literal["plain", "masked", "cached", "model"]

# Positions at which a model returns logits: every one, or only the last.
Logits = Literal["all", "last"]

# Use of the mask in a graph: it reads where the padding is, or counts the tokens of a row. In the latter case, padding
# between tokens may or may not be allowed.
Padding = Literal["anywhere", "counted", "contiguous"]

# Handling of new keys and values in an artifact: it returns them appended to the past, or writes them into buffers.
Cache = Literal["growing", "in-place"]

# torch.export treats a traced size of 0 or 1 as a constant.
_SMALLEST_DYNAMIC = 2
# Past and sequence are both traced with such a size, and add up to the total.
_SMALLEST_CACHED = 2 * _SMALLEST_DYNAMIC


class Range(Record):
    """Smallest and largest accepted number, both inclusive."""

    min: int
    max: int


class TensorSpec(Record):
    """One input or output tensor.

    Attributes:
        dtype: dtype of its elements.
        shape: sizes of the axes; a name refers to a range in `GraphSpec.axes`.
        values: range of its elements; ``None`` for no limit.
    """

    dtype: DType | Literal["int64"]
    shape: tuple[int | str, ...]
    values: Range | None = None


class GraphSpec(Record):
    """The interface of a deployed graph.

    Attributes:
        variant: ``plain`` is ``hidden_states [batch_size, sequence_length, D] -> output`` at positions ``0 .. S-1``;
            ``masked`` also takes an ``attention_mask`` and ``position_ids``; ``cached`` also takes the keys and values
            of the past, and returns those of past and present, with both key streams of a head side by side. ``model``
            is ``input_ids [batch_size, sequence_length] -> logits`` with the mask, the positions and the cache of each
            layer ``N``, ``past_key_values.N.key``.
        inputs: input tensors by name, in order.
        outputs: output tensors by name, in order.
        axes: ranges of the named axes.
        sums: axes whose size is the sum of other axes.
        padding: ``anywhere`` if the graph reads its mask; ``counted`` and ``contiguous`` if it counts the tokens of a
            row and returns nothing for padding, where ``contiguous`` allows no padding between tokens; see
            `diffdeploy.runtime.right_padding` for the inputs that it is given.
        cache: ``in-place`` if the artifact writes new keys and values into buffers that the caller passes; see
            `of_artifact`. The runtime takes and returns growing caches in either case.
    """

    variant: Variant
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    axes: dict[str, Range]
    sums: dict[str, tuple[str, ...]]
    padding: Padding = "anywhere"
    cache: Cache = "growing"

    @property
    def dtype(self) -> DType:
        """Dtype of all tensors that are not masks, tokens or positions."""
        dtype = self.outputs[self.main_output].dtype
        assert dtype != "int64"
        return dtype

    @property
    def main_input(self) -> str:
        """Name of the main input: the hidden states of a block, or the tokens of a model."""
        return "input_ids" if self.variant == "model" else "hidden_states"

    @property
    def main_output(self) -> str:
        """Name of the main output."""
        return "logits" if self.variant == "model" else "output"

    @property
    def caches(self) -> dict[str, str]:
        """Names of the outputs that return a cache, by the names of the inputs that take it."""
        return {
            name: name.replace("past_key_values.", "present.")
            for name in self.inputs
            if name.startswith("past_key_values.")
        }

    @property
    def logits(self) -> Logits:
        """Positions at which a model returns logits."""
        return "last" if self.outputs[self.main_output].shape[1:2] == (1,) else "all"

    @property
    def capacity(self) -> int:
        """Number of tokens for which a buffer of an in-place cache has space.

        It is one more than the longest sequence, since torch.export would specialise for a sequence that fills it.
        """
        return self.axes["total_sequence_length"].max + 1

    def of_artifact(self) -> "GraphSpec":
        """Interface of the artifact file itself.

        With an in-place cache, it takes buffers ``[B, h_kv, capacity, w]``, writes the last ``S`` of ``T`` tokens and
        then reads the first ``T``, where ``T`` is the width of ``attention_mask``. It returns no cache.
        """
        if self.cache == "growing":
            return self
        inputs = {
            name: tensor.model_copy(update={"shape": (*tensor.shape[:2], self.capacity, tensor.shape[3])})
            if name in self.caches
            else tensor
            for name, tensor in self.inputs.items()
        }
        outputs = {self.main_output: self.outputs[self.main_output]}
        axes = {name: bounds for name, bounds in self.axes.items() if name != "past_sequence_length"}
        return self.model_copy(update={"inputs": inputs, "outputs": outputs, "axes": axes, "sums": {}})

    def with_all_logits(self) -> "GraphSpec":
        """The same graph of a model, but with logits at every position."""
        output = self.outputs[self.main_output]
        everywhere = output.model_copy(update={"shape": ("batch_size", "sequence_length", output.shape[2])})
        return self.model_copy(update={"outputs": {**self.outputs, self.main_output: everywhere}})


def graph_spec(
    variant: Variant,
    config: AnyModel,
    *,
    dtype: DType,
    max_batch_size: int,
    max_sequence_length: int,
    logits: Logits = "all",
    padding: Padding = "anywhere",
    cache: Cache = "growing",
) -> GraphSpec:
    """Interface of a graph of a block or of a model, with all axes dynamic.

    Args:
        variant: see `GraphSpec`; ``model`` for a decoder and only for a decoder.
        config: config of the block or the decoder; ``position_ids`` is an input only with rotary embedding.
        dtype: dtype of all tensors that are not masks, tokens or positions.
        max_batch_size: largest batch.
        max_sequence_length: longest sequence, past included.
        logits: positions at which a model returns logits.
        padding: use of the mask in a model, see `GraphSpec`.
        cache: kind of cache of a model, see `GraphSpec`.

    Raises:
        InputError: a maximum is too low for a dynamic axis, or the variant does not fit the config.
    """
    is_model = isinstance(config, DecoderConfig)
    if is_model != (variant == "model"):
        raise InputError(f"graph is {variant}; accepted: {'model' if is_model else 'plain, masked or cached'}")
    if padding != "anywhere" and not is_model:
        raise InputError(f"padding is {padding}, which only graphs of models support")
    has_past = variant in ("cached", "model")
    if cache != "growing" and not is_model:
        raise InputError(f"cache is {cache}, which only graphs of models support")
    axes = _axes(max_batch_size, max_sequence_length, has_past=has_past)
    total = "total_sequence_length" if has_past else "sequence_length"
    inputs, outputs = {}, {}
    if isinstance(config, DecoderConfig):
        inputs["input_ids"] = TensorSpec(
            dtype="int64", shape=("batch_size", "sequence_length"), values=Range(min=0, max=config.vocab_size - 1)
        )
        positions: int | str = "sequence_length" if logits == "all" else 1
        outputs["logits"] = TensorSpec(dtype=dtype, shape=("batch_size", positions, config.vocab_size))
    else:
        hidden = TensorSpec(dtype=dtype, shape=("batch_size", "sequence_length", config.embed_dim))
        inputs["hidden_states"], outputs["output"] = hidden, hidden
    if variant != "plain":
        # Names and dtype that runtimes of language models use.
        inputs["attention_mask"] = TensorSpec(dtype="int64", shape=("batch_size", total), values=Range(min=0, max=1))
        if config.attention.rope is not None:
            inputs["position_ids"] = TensorSpec(
                dtype="int64",
                shape=("batch_size", "sequence_length"),
                # The rotary tables in the artifact end there.
                values=Range(min=0, max=max_sequence_length - 1),
            )
    for layer in _cached_layers(config) if has_past else ():
        for name, tensor, axis in _cache(layer, config.attention, dtype):
            (inputs if axis == "past_sequence_length" else outputs)[name] = tensor
    return GraphSpec(
        variant=variant,
        inputs=inputs,
        outputs=outputs,
        axes=axes,
        sums={total: ("past_sequence_length", "sequence_length")} if has_past else {},
        padding=padding,
        cache=cache,
    )


def _axes(max_batch_size: int, max_sequence_length: int, *, has_past: bool) -> dict[str, Range]:
    smallest = _SMALLEST_CACHED if has_past else _SMALLEST_DYNAMIC
    for name, size, least in (
        ("max batch size", max_batch_size, _SMALLEST_DYNAMIC),
        ("max sequence length", max_sequence_length, smallest),
    ):
        if size < least:
            raise InputError(f"{name} is {size}; accepted: {least} or more, since smaller axes cannot be dynamic")
    axes = {
        "batch_size": Range(min=1, max=max_batch_size),
        "sequence_length": Range(min=1, max=max_sequence_length),
    }
    if has_past:
        # The sum gets its own name, since formats cannot write a sum as the size of an axis.
        axes["past_sequence_length"] = Range(min=0, max=max_sequence_length - 1)
        axes["total_sequence_length"] = Range(min=1, max=max_sequence_length)
    return axes


def _cached_layers(config: AnyModel) -> list[str]:
    """Middle parts of the cache names: the number of each layer, or nothing for a block."""
    return [f"{number}." for number in range(config.num_layers)] if isinstance(config, DecoderConfig) else [""]


def _cache(layer: str, block: AnyConfig, dtype: DType) -> Iterator[tuple[str, TensorSpec, str]]:
    """Tensors of one layer's cache, past and present, with the name of their token axis."""
    for prefix, axis in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length")):
        for side, width in (("key", block.key_cache_dim), ("value", block.value_dim)):
            shape = ("batch_size", block.num_kv_heads, axis, width)
            yield f"{prefix}.{layer}{side}", TensorSpec(dtype=dtype, shape=shape), axis
