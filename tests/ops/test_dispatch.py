"""What is chosen for a call: the implementation that `auto` takes, and grouped heads on CUDA."""

import pytest
import torch
from torch import Tensor

from diffdeploy.ops import diff_attention
from diffdeploy.ops.request import HeadNorm
from diffdeploy.ops.target import traced_for
from tests.support.operator_inputs import IMPLEMENTATIONS, random_inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (40, 40), (300, 300)], ids=str)
def test_auto_takes_one_that_is_right(dtype: torch.dtype, queries: int, keys: int) -> None:
    q, k, v = random_inputs(4, 2, queries, keys, dtype=dtype)
    lam = torch.tensor(0.4)
    exact = diff_attention(q.double(), k.double(), v.double(), lam.double(), causal=True, impl="two_call")
    actual = diff_attention(q, k, v, lam, causal=True)
    assert (actual - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


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


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_can_be_followed_by_a_norm(impl: str, gamma: bool) -> None:
    q, k, v = random_inputs(4, 2, 1 if impl == "rows" else 9, 9)
    lam = torch.tensor(0.4, dtype=torch.float64)
    weight = torch.linspace(0.5, 1.5, 8, dtype=torch.float64) if gamma else None
    heads = diff_attention(q, k, v, lam, causal=True, impl=impl)
    expected = 0.8 * heads / torch.sqrt(heads.square().mean(-1, keepdim=True) + 1e-3)
    expected = expected if weight is None else expected * weight
    actual = diff_attention(q, k, v, lam, causal=True, norm=HeadNorm(1e-3, weight, 0.8), impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
