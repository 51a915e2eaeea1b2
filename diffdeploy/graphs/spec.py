"""`GraphSpec`: names, dtypes, axes and ranges of a deployed graph; what exporters promise and runtimes check."""

from typing import Literal

from diffdeploy.config import AnyConfig
from diffdeploy.errors import InputError
from diffdeploy.records import Record

__all__ = ["DType", "GraphSpec", "Range", "TensorSpec", "Variant", "graph_spec"]

DType = Literal["float32", "float16", "bfloat16"]
Variant = Literal["plain", "masked", "cached"]

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
            the past, and gives those of past and present; both key streams of a head side by side.
        inputs: by name, in order.
        outputs: by name, in order.
        axes: ranges of the named axes.
        sums: axes whose size is the sum of others.
    """

    variant: Variant
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    axes: dict[str, Range]
    sums: dict[str, tuple[str, ...]]

    @property
    def dtype(self) -> DType:
        """Of everything that is not a mask or a position."""
        dtype = self.inputs["hidden_states"].dtype
        assert dtype != "int64"
        return dtype


def graph_spec(
    variant: Variant, config: AnyConfig, *, dtype: DType, max_batch_size: int, max_sequence_length: int
) -> GraphSpec:
    """The interface of a block's graph, with all axes dynamic.

    Args:
        variant: see `GraphSpec`.
        config: of the block; ``position_ids`` is an input only where there is rotary embedding.
        dtype: of everything that is not a mask or a position.
        max_batch_size: largest batch.
        max_sequence_length: longest sequence, past included.

    Raises:
        InputError: a maximum is so low that its axis would not be dynamic.
    """
    smallest = _SMALLEST_CACHED if variant == "cached" else _SMALLEST_DYNAMIC
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
    total = "sequence_length"
    if variant == "cached":
        # A name of its own, since formats cannot write a sum where an axis is named.
        total = "total_sequence_length"
        axes["past_sequence_length"] = Range(min=0, max=max_sequence_length - 1)
        axes[total] = Range(min=1, max=max_sequence_length)
    hidden = TensorSpec(dtype=dtype, shape=("batch_size", "sequence_length", config.embed_dim))
    inputs, outputs = {"hidden_states": hidden}, {"output": hidden}
    if variant != "plain":
        # The names and the dtype that runtimes of language models feed.
        inputs["attention_mask"] = TensorSpec(dtype="int64", shape=("batch_size", total), values=Range(min=0, max=1))
        if config.rope is not None:
            inputs["position_ids"] = TensorSpec(
                dtype="int64",
                shape=("batch_size", "sequence_length"),
                # The rotary tables in the artifact end there.
                values=Range(min=0, max=max_sequence_length - 1),
            )
    if variant == "cached":
        heads = config.num_kv_heads
        for side, width in (("key", config.key_cache_dim), ("value", config.value_dim)):
            inputs[f"past_key_values.{side}"] = TensorSpec(
                dtype=dtype, shape=("batch_size", heads, "past_sequence_length", width)
            )
            outputs[f"present.{side}"] = TensorSpec(dtype=dtype, shape=("batch_size", heads, total, width))
    return GraphSpec(
        variant=variant,
        inputs=inputs,
        outputs=outputs,
        axes=axes,
        sums={total: ("past_sequence_length", "sequence_length")} if variant == "cached" else {},
    )
