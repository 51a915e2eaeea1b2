"""The error of the eager block, in the artifact's dtype, against the exact result: the yardstick of a case."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.graphs import DType, run_block
from diffdeploy.verify.metrics import Yardstick

if TYPE_CHECKING:
    import torch

    from diffdeploy.modules import AttentionBlock

__all__ = ["RunArrays", "eager_error", "run_arrays"]

RunArrays = Callable[[Mapping[str, Array]], dict[str, Array]]

# Many positions average over enough numbers by themselves, and one neighbour is enough.
_MANY_POSITIONS, _NEIGHBOURS, _NEIGHBOURS_OF_FEW = 300, 1, 7
# Numbers in the inputs of one call: 16 MiB in fp32.
_MAX_STACKED = 2**22
_UP_OR_DOWN = 0.5


def run_arrays(block: "AttentionBlock", *, device: str = "cpu", dtype: "torch.dtype | None" = None) -> RunArrays:
    """The eager block as a function of arrays by the names of a graph, without gradients.

    Args:
        block: block on the device.
        device: where the inputs go.
        dtype: dtype that floating-point inputs are given in; by default their own.
    """
    import torch

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: to_tensor(array) for name, array in inputs.items()}
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        with torch.no_grad():
            return {name: to_array(tensor) for name, tensor in run_block(block, moved).items()}

    return run


def eager_error(
    eager: RunArrays, inputs: Mapping[str, Array], expected: Mapping[str, Array], dtype: DType
) -> dict[str, Yardstick]:
    """Run the eager block on an input, and on ones that differ from it in the last bits.

    Args:
        eager: block, see `run_arrays`.
        inputs: arrays by the names of the graph.
        expected: exact outputs by name.
        dtype: dtype of the artifact.

    Returns:
        A yardstick for each output, by name.
    """
    yardsticks = {name: Yardstick(array, dtype) for name, array in expected.items()}
    batch_size = len(inputs["hidden_states"])
    for stack in _stacks(inputs):
        outputs = eager(stack)
        for name, yardstick in yardsticks.items():
            stacked = outputs[name]
            for start in range(0, len(stacked), batch_size):
                yardstick.add(stacked[start : start + batch_size])
    return yardsticks


def _stacks(inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The input, then its neighbours, several in one batch where that is small, since calls cost more than numbers."""
    yield dict(inputs)
    x_BSD = inputs["hidden_states"]
    # The same neighbours each time, so that a verification that is repeated gives the same figures.
    generator = np.random.default_rng(0)
    left = _NEIGHBOURS if x_BSD.shape[0] * x_BSD.shape[1] > _MANY_POSITIONS else _NEIGHBOURS_OF_FEW
    at_once = max(1, _MAX_STACKED // sum(array.size for array in inputs.values()))
    while left > 0:
        size = min(at_once, left)
        repeated = {name: np.concatenate([array] * size) for name, array in inputs.items()}
        yield {**repeated, "hidden_states": np.concatenate([_nudge(x_BSD, generator) for _ in range(size)])}
        left -= size


def _nudge(x_BSD: Array, generator: np.random.Generator) -> Array:
    """Every number one step up or down; NaN and infinity as they are."""
    # Equal positions stay equal: what makes them hard is that their roundings do not average out.
    constant = bool((x_BSD == x_BSD[:, :1]).all())
    shape = (len(x_BSD), 1, x_BSD.shape[2]) if constant else x_BSD.shape
    directions = np.where(generator.random(shape) < _UP_OR_DOWN, -np.inf, np.inf).astype(x_BSD.dtype)
    nudged: Array = np.where(np.isfinite(x_BSD), np.nextafter(x_BSD, directions), x_BSD)
    return nudged
