"""`GraphSpec`: names, dtypes, axes and ranges of a deployed graph; what exporters promise and runtimes check."""

from collections.abc import Iterator
from typing import Literal

from diffdeploy.config import AnyConfig, AnyModel, DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.records import Record

__all__ = ["Cache", "DType", "GraphSpec", "Logits", "Padding", "Range", "TensorSpec", "Variant", "graph_spec"]

DType = Literal["float32", "float16", "bfloat16"]
Variant = Literal["plain", "masked", "cached", "model"]

# Of a model: at every position, or at the last one.
Logits = Literal["all", "last"]

# What a graph makes of its mask: it looks where padding is; or it counts the tokens of a row, between which there may
# be padding, or not.
Padding = Literal["anywhere", "counted", "contiguous"]

# What an artifact does with new keys and values: it returns them behind the past ones, or writes them into buffers.
Cache = Literal["growing", "in-place"]

# torch.export takes a traced size of 0 or 1 for a constant.
_SMALLEST_DYNAMIC = 2
# Past and sequence are traced with such a size each, and add up to the total.
_SMALLEST_CACHED = 2 * _SMALLEST_DYNAMIC


class Range(Record):
    """Smallest and largest accepted number, both inclusive."""

    min: int
    max: int


class TensorSpec(Record):
    """One input or output.

    Attributes:
        dtype: of its elements.
        shape: an axis is a size, or the name of a range in `GraphSpec.axes`.
        values: what its elements may be; ``None`` for anything.
    """

    dtype: DType | Literal["int64"]
    shape: tuple[int | str, ...]
    values: Range | None = None


class GraphSpec(Record):
    """The interface of a deployed graph.

    Attributes:
        variant: ``plain`` is ``hidden_states [batch_size, sequence_length, D] -> output`` at positions ``0 .. S-1``;
            ``masked`` takes an ``attention_mask`` and ``position_ids`` too; ``cached`` also takes keys and values of
            the past, and gives those of past and present; both key streams of a head side by side. ``model`` is
            ``input_ids [batch_size, sequence_length] -> logits`` with the mask, the positions and the cache of each
            layer ``N``, ``past_key_values.N.key``.
        inputs: by name, in order.
        outputs: by name, in order.
        axes: ranges of the named axes.
        sums: axes whose size is the sum of others.
        padding: ``anywhere`` where the graph looks at its mask; ``counted`` and ``contiguous`` where it counts the
            tokens of a row, and gives nothing for padding, of which the latter takes none between tokens; see
            `diffdeploy.runtime.right_padding` for what is fed to it.
        cache: ``in-place`` where the artifact writes new keys and values into buffers that the caller passes; see
            `of_artifact`. The runtime takes and returns growing caches all the same.
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
        """Of everything that is not a mask or a position."""
        dtype = self.outputs[self.main_output].dtype
        assert dtype != "int64"
        return dtype

    @property
    def main_input(self) -> str:
        """What is computed from: hidden states of a block, tokens of a model."""
        return "input_ids" if self.variant == "model" else "hidden_states"

    @property
    def main_output(self) -> str:
        """What is computed."""
        return "logits" if self.variant == "model" else "output"

    @property
    def caches(self) -> dict[str, str]:
        """Names of the outputs that hand a cache on, by the names of the inputs that take it."""
        return {
            name: name.replace("past_key_values.", "present.")
            for name in self.inputs
            if name.startswith("past_key_values.")
        }

    @property
    def logits(self) -> Logits:
        """At which positions a model gives logits."""
        return "last" if self.outputs[self.main_output].shape[1:2] == (1,) else "all"

    @property
    def capacity(self) -> int:
        """Tokens that a buffer of an in-place cache has room for.

        One more than the longest sequence: torch.export would make a case of its own of a sequence that fills it.
        """
        return self.axes["total_sequence_length"].max + 1

    def of_artifact(self) -> "GraphSpec":
        """The interface of the file itself.

        With an in-place cache it takes buffers ``[B, h_kv, capacity, w]``, of which it reads the first ``T`` tokens
        after writing the last ``S`` of them, ``T`` being the width of ``attention_mask``. It returns no cache.
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
        """The same graph of a model, with logits at every position."""
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
    """The interface of a graph of a block or of a model, with all axes dynamic.

    Args:
        variant: see `GraphSpec`; ``model`` for a decoder, and for nothing else.
        config: of the block or the decoder; ``position_ids`` is an input only where there is rotary embedding.
        dtype: of everything that is not a mask, a token or a position.
        max_batch_size: largest batch.
        max_sequence_length: longest sequence, past included.
        logits: of a model, at which positions.
        padding: of a model, see `GraphSpec`.
        cache: of a model, see `GraphSpec`.

    Raises:
        InputError: a maximum is so low that its axis would not be dynamic, or the variant is not one of the config.
    """
    is_model = isinstance(config, DecoderConfig)
    if is_model != (variant == "model"):
        raise InputError(f"graph is {variant}; accepted is {'model' if is_model else 'plain, masked or cached'}")
    if padding != "anywhere" and not is_model:
        raise InputError(f"padding is {padding}, which graphs of blocks do not have")
    has_past = variant in ("cached", "model")
    if cache != "growing" and not is_model:
        raise InputError(f"cache is {cache}, which graphs of blocks do not have")
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
        # The names and the dtype that runtimes of language models feed.
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
            raise InputError(f"{name} is {size}; accepted is {least} or more, since the axis is dynamic from 1")
    axes = {
        "batch_size": Range(min=1, max=max_batch_size),
        "sequence_length": Range(min=1, max=max_sequence_length),
    }
    if has_past:
        # A name of its own, since formats cannot write a sum where an axis is named.
        axes["past_sequence_length"] = Range(min=0, max=max_sequence_length - 1)
        axes["total_sequence_length"] = Range(min=1, max=max_sequence_length)
    return axes


def _cached_layers(config: AnyModel) -> list[str]:
    """What the names of a cache have between dots: the number of its layer, or nothing in a block."""
    return [f"{number}." for number in range(config.num_layers)] if isinstance(config, DecoderConfig) else [""]


def _cache(layer: str, block: AnyConfig, dtype: DType) -> Iterator[tuple[str, TensorSpec, str]]:
    """The tensors of one layer's cache, past and present, with the axis of their tokens."""
    for prefix, axis in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length")):
        for side, width in (("key", block.key_cache_dim), ("value", block.value_dim)):
            shape = ("batch_size", block.num_kv_heads, axis, width)
            yield f"{prefix}.{layer}{side}", TensorSpec(dtype=dtype, shape=shape), axis
