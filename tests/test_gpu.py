"""On CUDA: every implementation, the blocks and their cache against the row-by-row formula."""

import numpy as np
import pytest
import torch

from diffdeploy.config import GqaLayout
from diffdeploy.ops import diff_attention
from tests import oracles
from tests.support.blocks import BLOCK_CONFIGS, empty_cache, make_block, random_states
from tests.support.operator_inputs import IMPLEMENTATIONS, bias_of, masks, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [None, "left", "full", "additive", "per_half_head"])
def test_operator(impl: str, layout: GqaLayout, dtype: torch.dtype, name: str | None) -> None:
    q, k, v = random_inputs(4, 2, 33, 33, dtype=dtype)
    mask = None if name is None else masks(33, 33, 4)[name]
    lam = torch.tensor(0.4, dtype=torch.float64)
    bias = bias_of(mask, 4, causal=True, window=None, queries=33, keys=33)
    arrays = (q.double().numpy(), k.double().numpy(), v.double().numpy(), np.array(0.4), bias)
    expected = oracles.masked_diff_attention(*arrays, legacy=layout == "legacy")
    on_device = [side.cuda() for side in (q, k, v, lam)]
    output = diff_attention(
        on_device[0],
        on_device[1],
        on_device[2],
        on_device[3],
        causal=True,
        attn_mask=None if mask is None else mask.cuda(),
        gqa_layout=layout,
        impl=impl,
    )
    error = np.abs(output.double().cpu().numpy() - expected).max()
    assert error < 16 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("name", BLOCK_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_with_padding_and_cache(name: str, dtype: torch.dtype) -> None:
    exact, block = make_block(name), make_block(name, dtype=dtype).cuda()
    x = random_states(2, 9, dtype)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = exact(x.double(), mask, positions)
    cache, outputs = tuple(side.cuda() for side in empty_cache(exact, 2, dtype)), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        rows = slice(start, stop)
        output, cache = block(x[:, rows].cuda(), mask[:, :stop].cuda(), positions[:, rows].cuda(), cache)
        outputs.append(output)
    joined = torch.cat(outputs, dim=1).cpu()
    assert torch.isfinite(joined).all()
    error = (joined - expected).square().mean().sqrt()
    assert error < 32 * torch.finfo(dtype).eps * expected.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["two_call", "padded", "paired", "rows"])
def test_a_hidden_key_is_not_seen_whatever_its_score(impl: str, dtype: torch.dtype) -> None:
    """Hidden keys have the largest scores of all, 1e6 and more; a bias in place of minus infinity lets them through."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 65, 64, generator=generator) for heads in (8, 8, 4))
    seen = torch.ones(2, 1, 1, 65, dtype=torch.bool)
    seen[..., 20:40] = False
    k[:, :, 20:40] = 3e3 * q[:, :, -1:].sign()
    q = 3e3 * q.sign()
    q, k, v = (side.to("cuda", dtype) for side in (q, k, v))
    lam, mask = torch.tensor(0.4), seen.cuda()
    with_them = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, impl=impl)
    k[:, :, 20:40] = 0.0
    without = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, impl=impl)
    torch.testing.assert_close(with_them, without, rtol=0, atol=0)
