"""The yardstick of a case: the error of the eager block in the artifact's dtype against the exact result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.graphs import DType, run_graph
from diffdeploy.verify.decoder import inputs_of_layer
from diffdeploy.verify.metrics import Yardstick

if TYPE_CHECKING:
    import torch

    from diffdeploy.modules import AnyModule, DiffTransformer

__all__ = [
    "RunArrays",
    "eager_error",
    "eager_errors",
    "for_queries",
    "run_arrays",
    "run_head",
    "run_layer",
    "run_layers",
]

RunArrays = Callable[[Mapping[str, Array]], dict[str, Array]]

# With this many positions, averages are stable, and one neighbour is enough.
_MANY_POSITIONS, _NEIGHBOURS, _NEIGHBOURS_OF_FEW = 300, 1, 7
# Maximum number of elements in the inputs of one call: 16 MiB in fp32.
_MAX_STACKED = 2**22
_UP_OR_DOWN = 0.5


def run_arrays(
    block: "AnyModule", *, device: str = "cpu", dtype: "torch.dtype | None" = None, last_only: bool = False
) -> RunArrays:
    """Turn an eager block into a function that takes and returns arrays by the names of a graph, without gradients.

    Args:
        block: block on the device.
        device: device of the inputs.
        dtype: dtype to which floating-point inputs are cast; their own by default.
        last_only: see `run_graph`.
    """
    import torch

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: to_tensor(array) for name, array in inputs.items()}
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        with torch.no_grad(), _fast_products(device):
            return {name: to_array(tensor) for name, tensor in run_graph(block, moved, last_only=last_only).items()}

    return run


def run_layers(
    model: "DiffTransformer", inputs: Mapping[str, Array], *, last_only: bool = False
) -> Iterator[tuple[str, Array]]:
    """Yield the caches of each eager layer in order, then the logits, by the names of the model's graph.

    Each can be dropped before the next is computed: all caches may take as much memory as a large part of the model.

    Args:
        model: eager model.
        inputs: inputs by the names of its graph.
        last_only: see `run_graph`.
    """
    import torch

    with torch.no_grad():
        x_BSD = to_array(model.embedding(to_tensor(inputs["input_ids"])))
    for number in range(model.config.num_layers):
        outputs = run_layer(model, number)({"hidden_states": x_BSD, **inputs_of_layer(inputs, number)})
        x_BSD = outputs.pop("output")
        for side in ("key", "value"):
            yield f"present.{number}.{side}", outputs.pop(f"present.{side}")
    yield "logits", run_head(model, x_BSD[:, -1:] if last_only else x_BSD)


def run_layer(model: "DiffTransformer", number: int) -> RunArrays:
    """Turn an eager layer into a function that takes and returns arrays by the names of a block's graph."""
    import torch

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: to_tensor(array) for name, array in inputs.items()}
        past = given["past_key_values.key"], given["past_key_values.value"]
        x_BSD = given["hidden_states"]
        turn = model.rotation(x_BSD.shape[1], given.get("position_ids"), past[0].shape[2])
        with torch.no_grad(), _fast_products("cpu"):
            output, (key, value) = model.layers[number](x_BSD, given["attention_mask"], turn, past)
        return {"output": to_array(output), "present.key": to_array(key), "present.value": to_array(value)}

    return run


def run_head(model: "DiffTransformer", x_BSD: Array) -> Array:
    """Compute eager logits ``[B, S, V]`` from the output of the last layer."""
    import torch

    with torch.no_grad(), _fast_products("cpu"):
        return to_array(model.lm_head(model.norm(to_tensor(x_BSD))))


def _fast_products(device: str) -> AbstractContextManager[Any]:
    """On CPUs, which have no kernel for float16 products, compute them in float32, which is five times as fast.

    Both accumulate in float32 and round once, so the errors are the same.
    """
    if device != "cpu":
        return nullcontext()
    import torch
    from torch.overrides import TorchFunctionMode

    products = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)

    class InFloat32(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function not in products or args[0].dtype != torch.float16:
                return function(*args, **(kwargs or {}))
            wide = [None if side is None else side.float() for side in args]
            return function(*wide, **{name: side.float() for name, side in (kwargs or {}).items()}).half()

    return InFloat32()


@contextmanager
def for_queries(block: "AnyModule", queries: Array | None) -> Iterator[None]:
    """In this context, compute the block's output only at some positions, from all keys and values.

    Args:
        block: eager block.
        queries: ascending positions; ``None`` for all.
    """
    if queries is None:
        yield
        return
    import torch
    from torch import Tensor

    from diffdeploy.modules import AttentionBlock
    from diffdeploy.ops import diff_attention

    assert isinstance(block, AttentionBlock)
    chosen, config, impl = torch.from_numpy(queries), block.config, block.impl

    def attend(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        age = (k.shape[2] - q.shape[2] + chosen)[:, None] - torch.arange(k.shape[2])
        seen = age >= 0 if causal else torch.ones_like(age, dtype=torch.bool)
        if config.sliding_window is not None:
            seen = seen & (age < config.sliding_window)
        return diff_attention(
            q[:, :, chosen],
            k,
            v,
            # Lambda may have an entry for each token.
            lam[:, :, chosen] if lam.ndim else lam,
            causal=False,
            attn_mask=seen[None, None] if mask is None else mask & seen,
            gqa_layout=config.gqa_layout,
            scale=config.scale,
            impl=impl,
        )

    # Set on the instance, which keeps all other steps of its class.
    block.__dict__["attend"] = attend
    try:
        yield
    finally:
        del block.__dict__["attend"]


def eager_error(
    eager: RunArrays, inputs: Mapping[str, Array], expected: Mapping[str, Array], dtype: DType
) -> dict[str, Yardstick]:
    """Like `eager_errors`, but for all rows together: a yardstick for each output, by name."""
    (of_all_rows,) = eager_errors(eager, inputs, expected, dtype, [slice(None)])
    return of_all_rows


def eager_errors(
    eager: RunArrays,
    inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    dtype: DType,
    groups: Sequence[slice],
) -> list[dict[str, Yardstick]]:
    """Run the eager block on an input, and on neighbours that differ from it in the last bits.

    Args:
        eager: block, see `run_arrays`.
        inputs: arrays by the names of the graph.
        expected: exact outputs by name.
        dtype: dtype of the artifact.
        groups: rows that are judged together.

    Returns:
        A yardstick for each output by name, for each group.
    """
    yardsticks = [{name: Yardstick(array[rows], dtype) for name, array in expected.items()} for rows in groups]
    batch_size = len(next(iter(inputs.values())))
    for stack in _stacks(inputs):
        outputs = eager(stack)
        for name, stacked in outputs.items():
            for start in range(0, len(stacked), batch_size):
                run = stacked[start : start + batch_size]
                for rows, of_outputs in zip(groups, yardsticks, strict=True):
                    of_outputs[name].add(run[rows])
    return yardsticks


def _stacks(inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Yield the input, then its neighbours, batched where they are small, since the cost of calls dominates there."""
    yield dict(inputs)
    x_BSD = inputs["hidden_states"]
    # A fixed seed, so that repeated verifications give the same figures.
    generator = np.random.default_rng(0)
    left = _NEIGHBOURS if x_BSD.shape[0] * x_BSD.shape[1] > _MANY_POSITIONS else _NEIGHBOURS_OF_FEW
    at_once = max(1, _MAX_STACKED // sum(array.size for array in inputs.values()))
    while left > 0:
        size = min(at_once, left)
        repeated = {name: np.concatenate([array] * size) for name, array in inputs.items()}
        yield {**repeated, "hidden_states": np.concatenate([_nudge(x_BSD, generator) for _ in range(size)])}
        left -= size


def _nudge(x_BSD: Array, generator: np.random.Generator) -> Array:
    """Move every number one step up or down; NaN and infinity stay unchanged."""
    # Equal positions stay equal: they are difficult because their rounding errors do not average out.
    constant = bool((x_BSD == x_BSD[:, :1]).all())
    shape = (len(x_BSD), 1, x_BSD.shape[2]) if constant else x_BSD.shape
    directions = np.where(generator.random(shape) < _UP_OR_DOWN, -np.inf, np.inf).astype(x_BSD.dtype)
    nudged: Array = np.where(np.isfinite(x_BSD), np.nextafter(x_BSD, directions), x_BSD)
    return nudged
