"""Every implementation backwards: gradients, and zeros for rows that see nothing."""

import pytest
import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.ops import diff_attention
from tests.support.operator_inputs import IMPLEMENTATIONS, INFINITY, masks, random_inputs
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.usefixtures("_small_chunks")


@pairwise(
    impl=IMPLEMENTATIONS,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    name=["all_hidden", "full", "additive"],
)
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


@pairwise(impl=IMPLEMENTATIONS, layout=["canonical", "legacy"], name=[None, "full"])
def test_gradients(impl: str, layout: GqaLayout, name: str | None) -> None:
    q, k, v = (side[:1].requires_grad_() for side in random_inputs(4, 2, 3, 3))
    mask = None if name is None else masks(3, 3, 4)[name][:1]
    lam = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        return diff_attention(q, k, v, lam, causal=True, attn_mask=mask, gqa_layout=layout, impl=impl)

    assert torch.autograd.gradcheck(run, (q, k, v, lam))
