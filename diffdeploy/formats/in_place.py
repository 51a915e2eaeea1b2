"""In-place caches of torch artifacts: the conversion from and to growing caches, and buffers for generation.

Shape suffixes: B batch, S new tokens, P past tokens, T = P + S.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.formats.artifact import CacheBuffers
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TorchBuffers", "as_growing", "buffers_of", "caches_of"]

Call = Callable[..., "Sequence[Tensor]"]


def buffers_of(spec: GraphSpec, tensors: "Sequence[Tensor]") -> "list[Tensor]":
    """Inputs of the artifact, with each past ``[B, h_kv, P, w]`` copied into a buffer ``[B, h_kv, capacity, w]``.

    Args:
        spec: interface of the graph, with either kind of cache.
        tensors: inputs of the graph, in its order.
    """
    if spec.cache == "growing":
        return list(tensors)
    taken = []
    for name, tensor in zip(spec.inputs, tensors, strict=True):
        if name in spec.caches:
            batch, heads, past_length, width = tensor.shape
            # Zeros, since the system allocates their memory only when they are written to.
            buffer = tensor.new_zeros(batch, heads, spec.capacity, width)
            buffer[:, :, :past_length] = tensor
            taken.append(buffer)
        else:
            taken.append(tensor)
    return taken


def caches_of(spec: GraphSpec, inputs: "Sequence[Tensor]", outputs: "Sequence[Tensor]") -> "list[Tensor]":
    """Outputs of the graph, in its order.

    Args:
        spec: interface of the graph, with either kind of cache.
        inputs: inputs of the artifact, after the call that wrote into them.
        outputs: outputs of the artifact.
    """
    if spec.cache == "growing":
        return list(outputs)
    named = dict(zip(spec.inputs, inputs, strict=True))
    total = named["attention_mask"].shape[1]
    # Copies, since views would keep the whole buffers in memory.
    return [*outputs, *(named[name][:, :, :total].clone() for name in spec.caches)]


def as_growing(spec: GraphSpec, call: Call) -> Call:
    """Wrap an artifact with an in-place cache as a callable that takes and returns the tensors of the graph."""

    def run(*tensors: "Tensor") -> "Sequence[Tensor]":
        inputs = buffers_of(spec, tensors)
        return caches_of(spec, inputs, call(*inputs))

    return run


class TorchBuffers(CacheBuffers):
    """Cache buffers of one batch of sequences.

    Args:
        spec: interface of the graph, with an in-place cache.
        call: the artifact.
        device: device that it runs on.
        batch_size: number of rows.
        fill: initial value of the buffers.
    """

    def __init__(self, spec: GraphSpec, call: Call, device: str, batch_size: int, fill: float) -> None:
        self._spec, self._call, self._device = spec, call, device
        self.capacity = spec.capacity
        artifact, dtype = spec.of_artifact(), getattr(torch, spec.dtype)
        # Zeros need not be written: the system allocates their memory only when they are written to.
        make = torch.zeros if fill == 0 else partial(torch.full, fill_value=fill)
        self._buffers = {
            name: make((batch_size, *map(int, artifact.inputs[name].shape[1:])), dtype=dtype, device=device)
            for name in spec.caches
        }

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """See `CacheBuffers.run`."""
        given = {name: to_tensor(array).to(self._device) for name, array in inputs.items()}
        with torch.no_grad():
            (logits,) = self._call(*(given.get(name, self._buffers.get(name)) for name in self._spec.inputs))
        return to_array(logits)

    def arrays(self) -> dict[str, Array]:
        """See `CacheBuffers.arrays`."""
        return {name: to_array(buffer) for name, buffer in self._buffers.items()}
