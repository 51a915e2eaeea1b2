"""Masks, positions and the cache of the blocks, both versions; tracing and compiling them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffdeploy.errors import InputError
from diffdeploy.modules import DiffAttention, block_class
from tests.support.blocks import BLOCK_CONFIGS, empty_cache, make_block, random_states
from tests.support.operator_inputs import IMPLEMENTATIONS
from tests.support.pairwise import each_value, pairwise


@pairwise(impl=IMPLEMENTATIONS, name=list(BLOCK_CONFIGS), chunks=[(9,), (1,) * 9, (4, 1, 4), (8, 1)])
def test_any_split_equals_one_pass(name: str, impl: str, chunks: tuple[int, ...]) -> None:
    block, x = make_block(name, impl), random_states(2, 9)
    cache, outputs, done = empty_cache(block, 2), [], 0
    for chunk in chunks:
        mask = torch.ones(2, done + chunk, dtype=torch.int64)
        output, cache = block(x[:, done : done + chunk], mask, None, cache)
        outputs.append(output)
        done += chunk
    torch.testing.assert_close(torch.cat(outputs, dim=1), block(x), rtol=0, atol=1e-12)
    numbers = 2 * 9 * (block.config.num_key_streams * 6 + block.config.num_kv_heads * block.config.value_dim)
    assert cache[0].numel() + cache[1].numel() == numbers


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_left_padding_changes_nothing(name: str, impl: str) -> None:
    block, x = make_block(name, impl), random_states(1, 6)
    padded = torch.cat((random_states(1, 3) * 100, x), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    position_ids = torch.tensor([[0] * 3 + list(range(6))])
    output = block(padded, mask, position_ids)
    torch.testing.assert_close(output[:, 3:], block(x), rtol=0, atol=1e-12)
    assert (output[:, :3] == 0).all()


@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_right_padding_changes_nothing(name: str) -> None:
    block, x = make_block(name), random_states(1, 6)
    padded = torch.cat((x, random_states(1, 3) * 100), dim=1)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    torch.testing.assert_close(block(padded, mask)[:, :6], block(x), rtol=0, atol=1e-12)


def test_position_ids_choose_the_rotation() -> None:
    block, x = make_block("v1"), random_states(2, 5)
    ids = torch.arange(5).expand(2, 5)
    torch.testing.assert_close(block(x, None, ids), block(x), rtol=0, atol=0)
    shifted = block(x, None, ids + 7)  # only distances matter
    torch.testing.assert_close(shifted, block(x), rtol=0, atol=1e-12)
    assert (block(x, None, ids * 2) - block(x)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCK_CONFIGS)
def test_low_precision_with_masks(name: str, dtype: torch.dtype) -> None:
    block, exact = make_block(name, dtype=dtype), make_block(name)
    x = random_states(2, 9, dtype)
    mask = torch.tensor([[0] * 2 + [1] * 7, [0] * 9])
    output = block(x, mask)
    assert output.dtype == dtype
    assert torch.isfinite(output).all()
    assert (output[1] == 0).all()
    expected = exact(x.double(), mask)
    assert (output - expected).square().mean().sqrt() < 32 * torch.finfo(dtype).eps * expected.square().mean().sqrt()


def test_blocks_can_be_trained() -> None:
    for name, config in BLOCK_CONFIGS.items():
        block = block_class(config)(config)
        block(random_states(2, 5, torch.float32), torch.tensor([[1] * 5, [0] * 5])).square().sum().backward()
        for key, parameter in block.named_parameters():
            assert parameter.grad is not None, f"{name} {key}"
            assert torch.isfinite(parameter.grad).all(), f"{name} {key}"
            assert parameter.grad.abs().max() > 0, f"{name} {key}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_key_values": "empty"}, "needs an attention_mask"),
        ({"attention_mask": torch.ones(2, 6)}, "accepted: an integer or boolean mask"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.int64)}, r"accepted: .* \[2, 6\]"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, "position_ids is"),
        ({"past_key_values": "wrong", "attention_mask": torch.ones(2, 8, dtype=torch.int64)}, "past key has shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    block = make_block("v1")
    caches = {"empty": empty_cache(block, 2), "wrong": (torch.zeros(2, 3, 2, 6), torch.zeros(2, 2, 2, 12))}
    if "past_key_values" in arguments:
        arguments = {**arguments, "past_key_values": caches[arguments["past_key_values"]]}
    with pytest.raises(InputError, match=message):
        block(random_states(2, 6), **arguments)


@each_value(most=3, impl=IMPLEMENTATIONS, name=list(BLOCK_CONFIGS))
def test_export_with_dynamic_batch_sequence_and_past(name: str, impl: str) -> None:
    block = make_block(name, impl)
    batch, length, past = (torch.export.Dim(n, min=low, max=32) for n, low in (("b", 1), ("s", 1), ("p", 0)))
    cache = tuple(side.new_ones(3, side.shape[1], 5, side.shape[3]) for side in empty_cache(block, 3))
    program = torch.export.export(
        block,
        (random_states(3, 4), torch.ones(3, 9, dtype=torch.int64), torch.arange(5, 9).repeat(3, 1), cache),
        dynamic_shapes=(
            {0: batch, 1: length},
            {0: batch, 1: torch.export.Dim.DYNAMIC(min=1, max=64)},
            {0: batch, 1: length},
            ({0: batch, 2: past}, {0: batch, 2: past}),
        ),
    ).module(
        check_guards=False
    )  # torch takes sequence and past for 2 at least where it adds them; 1 and 0 are run below
    for rows, steps in ((1, (1, 1, 1)), (2, (3, 2))):
        x, done = random_states(rows, sum(steps)), 0
        cache = empty_cache(block, rows)
        for step in steps:
            mask, ids = torch.ones(rows, done + step, dtype=torch.int64), torch.arange(done, done + step)
            chunk = x[:, done : done + step]
            output, cache = program(chunk, mask, ids.repeat(rows, 1), cache)
            done += step
        np.testing.assert_allclose(output.numpy(), block(x)[:, -step:].numpy(), rtol=0, atol=1e-12)


@pytest.fixture
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@each_value(
    most=2,
    impl=IMPLEMENTATIONS,
    compiled_as=[("v1", "eager"), ("v2", "aot_eager"), ("v1", "aot_eager"), ("v2", "eager")],
)
def test_compiles_whole_and_not_again_after_the_third_shape(compiled_as: tuple[str, str], impl: str) -> None:
    name, backend = compiled_as
    block = make_block(name, impl)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for number, (batch, length, past) in enumerate([(2, 3, 4), (3, 5, 6), (4, 7, 9), (5, 6, 11), (2, 9, 3), (6, 2, 2)]):
        x, mask = random_states(batch, past + length), torch.ones(batch, past + length, dtype=torch.int64)
        _, cache = block(x[:, :past], mask[:, :past], None, empty_cache(block, batch))
        with torch._dynamo.config.patch(error_on_recompile=number >= 3):
            output, _ = compiled(x[:, past:], mask, None, cache)
            plain = compiled(x)
        torch.testing.assert_close(output, block(x)[:, past:], rtol=0, atol=1e-12)
        torch.testing.assert_close(plain, block(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_compiles_with_inductor(name: str) -> None:
    block = make_block(name)
    x = random_states(2, 7)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=0, atol=1e-12)


class HalvedNorm(DiffAttention):
    """Replaces the step after the operator."""

    def normalise(self, heads: Tensor) -> Tensor:
        return super().normalise(heads) / 2


class NoHeads(DiffAttention):
    """Replaces the operator."""

    def attend(self, *sides: Any, **options: Any) -> Tensor:
        return super().attend(*sides, **options) * 0


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize(("replaced", "factor"), [(HalvedNorm, 0.5), (NoHeads, 0.0)], ids=["normalise", "attend"])
def test_replaced_steps_are_used(replaced: type[DiffAttention], factor: float, where: str) -> None:
    """Also where the operator could compute both steps at once."""
    block, x = make_block("v1"), random_states(2, 5)
    assert isinstance(block, DiffAttention)
    expected = block(x) * factor
    if where == "class":
        block.__class__ = replaced
    else:
        other = make_block("v1")
        other.__class__ = replaced
        name = "normalise" if replaced is HalvedNorm else "attend"
        block.__dict__[name] = getattr(other, name)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


class CalledOperators(TorchDispatchMode):
    """Names of the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.triton
def test_fused_computes_the_norm_in_its_kernel() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = make_block("v1", "fused").to(device, torch.float16).freeze()
    x = random_states(2, 5)
    with torch.no_grad(), CalledOperators() as called:
        output = block(x.to(device, torch.float16))
    assert sum("fused_attention" in name for name in called.names) == 1
    assert not any("norm" in name or "rsqrt" in name for name in called.names)
    torch.testing.assert_close(output.cpu().double(), make_block("v1")(x), rtol=0, atol=2e-3)
