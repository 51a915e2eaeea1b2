"""Every implementation of the operator against the row-by-row formula: key maps, masks, windows, gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops import diff_attention
from diffdeploy.ops.target import traced_for
from tests import oracles
from tests.support.operator_inputs import HEADS, IMPLEMENTATIONS, INFINITY, bias_of, masks, random_inputs, side_by_side
from tests.support.pairwise import pairwise


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries each, and three heads, so that sizes small enough for the formula's loops have several chunks."""
    monkeypatch.setattr("diffdeploy.ops.naive._ROWS", 2)
    monkeypatch.setattr("diffdeploy.ops.naive._SCORES", 3 * 2 * 2 * 2 * 5)


def check(actual: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS, ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["streams", "paired"])
def test_both_key_maps(impl: str, layout: GqaLayout, heads: int, kv_heads: int, pair: bool) -> None:
    q, k, v = random_inputs(heads, kv_heads, 5, 5)
    if pair:
        k = side_by_side(k)
    lam = torch.tensor(0.4, dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=True, gqa_layout=layout, impl=impl)
    bias = bias_of(None, heads, causal=True, window=None, queries=5, keys=5)
    arrays = (q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias)
    check(actual, oracles.masked_diff_attention(*arrays, legacy=layout == "legacy"))
    other = oracles.masked_diff_attention(*arrays, legacy=layout == "canonical")
    assert (np.abs(actual.numpy() - other).max() > 1e-3) == (heads != kv_heads)


@pairwise(
    impl=IMPLEMENTATIONS,
    name=list(masks(5, 5, 4)),
    causal={"causal": True, "full": False},
    sizes=[(5, 5), (3, 8), (1, 1), (1, 7)],
    pair={"streams": False, "paired": True},
)
def test_masks(impl: str, name: str, causal: bool, sizes: tuple[int, int], pair: bool) -> None:
    queries, keys = sizes
    q, k, v = random_inputs(4, 2, queries, keys)
    if pair:
        k = side_by_side(k)
    mask = masks(queries, keys, 4)[name]
    lam = torch.tensor(0.4, dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=causal, attn_mask=mask, impl=impl)
    bias = bias_of(mask, 4, causal=causal, window=None, queries=queries, keys=keys)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias))


@pairwise(
    impl=IMPLEMENTATIONS,
    window=[1, 2, 9],
    name=[None, "left", "additive", "per_head"],
    sizes=[(6, 6), (2, 7), (7, 3), (1, 9)],
    pair={"streams": False, "paired": True},
)
def test_sliding_window(impl: str, window: int, name: str | None, sizes: tuple[int, int], pair: bool) -> None:
    queries, keys = sizes
    q, k, v = random_inputs(3, 1, queries, keys)
    if pair:
        k = side_by_side(k)
    mask = None if name is None else masks(queries, keys, 3)[name]
    lam = torch.tensor(0.4, dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, sliding_window=window, impl=impl)
    bias = bias_of(mask, 3, causal=True, window=window, queries=queries, keys=keys)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS, ids=str)
@pytest.mark.parametrize("name", [None, "ragged", "per_head", "per_half_head"])
def test_shared_keys_and_lambda_per_token(impl: str, heads: int, kv_heads: int, name: str | None) -> None:
    q, k, v = random_inputs(heads, kv_heads, 5, 5, shared_keys=True)
    mask = None if name is None else masks(5, 5, heads)[name]
    lam = torch.rand(2, heads, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, impl=impl)
    bias = bias_of(mask, heads, causal=True, window=None, queries=5, keys=5)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), lam[..., 0].numpy(), bias))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["all_hidden", "full", "additive"])
def test_rows_that_see_nothing_are_zero_forward_and_backward(impl: str, dtype: torch.dtype, name: str) -> None:
    q, k, v = (side.requires_grad_() for side in random_inputs(4, 2, 5, 5, dtype=dtype))
    mask = masks(5, 5, 4)[name]
    seen = mask if mask.dtype == torch.bool else mask != -INFINITY
    output = diff_attention(q, k, v, torch.tensor(0.4), causal=False, attn_mask=mask, impl=impl)
    torch.autograd.backward(output.square().sum())
    dead = ~seen.any(-1).expand(2, 1, 5)[:, 0]
    assert dead.any()
    assert (output.detach().transpose(1, 2)[dead] == 0).all()
    for tensor in (output, q.grad, k.grad, v.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
@pytest.mark.parametrize("name", [None, "full"])
def test_gradients(impl: str, layout: GqaLayout, name: str | None) -> None:
    q, k, v = (side[:1].requires_grad_() for side in random_inputs(4, 2, 3, 3))
    mask = None if name is None else masks(3, 3, 4)[name][:1]
    lam = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return diff_attention(q, k, v, lam, causal=True, attn_mask=mask, gqa_layout=layout, impl=impl)

    assert torch.autograd.gradcheck(run, (q, k, v, lam))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "accepted is what broadcasts to"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "accepted is boolean"),
        ({"attn_mask": torch.ones(1, 1, 1, 5, 5, dtype=torch.bool)}, "at most 4 axes"),
        ({"sliding_window": 2, "causal": False}, "needs a causal operator"),
        ({"impl": "flash2"}, "flash2 runs on CUDA only, and the tensors are on cpu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], message: str) -> None:
    q, k, v = random_inputs(4, 2, 5, 5)
    with pytest.raises(DiffDeployError, match=message) as refused:
        diff_attention(q, k, v, torch.tensor(0.4), **{"causal": True, **changes})
    assert isinstance(refused.value, UnavailableError if "impl" in changes else InputError)


@pytest.mark.parametrize(("side", "kept"), [(0, 3), (0, 6), (1, 3), (2, 1)], ids=str)
def test_shapes_that_do_not_fit_are_refused(side: int, kept: int) -> None:
    inputs = list(random_inputs(4, 2, 5, 5))
    inputs[side] = inputs[side][:, :kept]
    with pytest.raises(InputError, match="do not fit"):
        diff_attention(inputs[0], inputs[1], inputs[2], torch.tensor(0.4), causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (40, 40), (300, 300)], ids=str)
def test_auto_takes_one_that_is_right(dtype: torch.dtype, queries: int, keys: int) -> None:
    q, k, v = random_inputs(4, 2, queries, keys, dtype=dtype)
    lam = torch.tensor(0.4)
    exact = diff_attention(q.double(), k.double(), v.double(), lam.double(), causal=True, impl="two_call")
    actual = diff_attention(q, k, v, lam, causal=True)
    assert (actual - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("queries", "keys", "window"), [(700, 700, None), (300, 900, None), (700, 700, 40)], ids=str)
def test_chunks_of_real_size(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, window: int | None) -> None:
    monkeypatch.undo()
    q, k, v = random_inputs(6, 2, queries, keys)
    settings: dict[str, Any] = {"causal": True, "sliding_window": window, "gqa_layout": "legacy"}
    lam = torch.rand(2, 6, queries, 1, dtype=torch.float64)
    two_calls = diff_attention(q, k, v, lam, **settings, impl="two_call")
    torch.testing.assert_close(diff_attention(q, k, v, lam, **settings, impl="chunked"), two_calls, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["four_call", "stacked_split"])
def test_odd_values_cannot_be_halved(impl: str) -> None:
    q, k, v = random_inputs(4, 2, 5, 5, shared_keys=True)
    with pytest.raises(InputError, match="their width 3 is odd"):
        diff_attention(q, k, v[..., :3], torch.tensor(0.4), causal=True, impl=impl)


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_graphs_for_cuda_give_float32_kernels_whole_heads(dtype: torch.dtype, groups: bool) -> None:
    """No fused CUDA kernel takes grouped heads in float32, and a graph for CUDA is traced on the CPU."""
    q, k, v = random_inputs(4, 2, 9, 9, dtype=dtype)
    lam = torch.tensor(0.4)

    class Operator(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return diff_attention(q, k, v, lam, causal=True, impl="padded")

    with traced_for("cuda"):
        program = torch.export.export(Operator(), (q, k, v))
    calls = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert [bool(node.kwargs.get("enable_gqa", False)) for node in calls] == [groups, groups]
    expected = Operator()(q, k, v)
    torch.testing.assert_close(program.module()(q, k, v), expected)
