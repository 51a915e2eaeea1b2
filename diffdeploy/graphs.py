"""`GraphSpec`: names, dtypes, axes and ranges of a deployed graph; what exporters promise and runtimes check."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from diffdeploy.errors import InputError

__all__ = ["AxisRange", "DType", "GraphSpec", "TensorSpec", "plain_graph"]

DType = Literal["float32", "float16"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AxisRange(_Frozen):
    """Smallest and largest accepted size of a named axis, both inclusive."""

    min: int
    max: int


class TensorSpec(_Frozen):
    """One input or output. An axis is a size, or the name of a range in `GraphSpec.axes`."""

    dtype: DType
    shape: tuple[int | str, ...]


class GraphSpec(_Frozen):
    """The interface of a deployed graph.

    Attributes:
        variant: ``plain`` is ``hidden_states [batch_size, sequence_length, D] -> output`` at positions ``0 .. S-1``.
        inputs: by name, in order.
        outputs: by name, in order.
        axes: ranges of the named axes.
    """

    variant: Literal["plain"]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    axes: dict[str, AxisRange]


def plain_graph(*, embed_dim: int, dtype: DType, max_batch_size: int, max_sequence_length: int) -> GraphSpec:
    """The ``plain`` variant with both axes dynamic from 1.

    Raises:
        InputError: a maximum is below 2, so that its axis would not be dynamic.
    """
    for name, size in (("max batch size", max_batch_size), ("max sequence length", max_sequence_length)):
        if size < 2:
            raise InputError(f"{name} is {size}; accepted is 2 or more, since the axis is dynamic from 1")
    tensor = TensorSpec(dtype=dtype, shape=("batch_size", "sequence_length", embed_dim))
    axes = {
        "batch_size": AxisRange(min=1, max=max_batch_size),
        "sequence_length": AxisRange(min=1, max=max_sequence_length),
    }
    return GraphSpec(variant="plain", inputs={"hidden_states": tensor}, outputs={"output": tensor}, axes=axes)
