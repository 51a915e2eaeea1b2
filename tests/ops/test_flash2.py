"""How FlashAttention-2 is called, with a stand-in of its semantics; and, marked ``gpu``, the real package."""

import re
import sys

import numpy as np
import pytest
import torch

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops import diff_attention
from diffdeploy.ops.flash2 import Road, flash2, num_calls, road_for, unsupported_mask
from diffdeploy.ops.request import Request
from tests import oracles
from tests.support import flash_attn_stand_in
from tests.support.operator_inputs import HEADS, PAIR, bias_of, masks, random_inputs, side_by_side
from tests.support.pairwise import pairwise

LAMBDA = torch.tensor(0.4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stand_in)
        flash_attn_stand_in.calls.clear()


@pairwise(
    road={road.value: road for road in Road},
    layout=["canonical", "legacy"],
    head_counts=HEADS,
    sizes=[(5, 5, None), (3, 7, None), (1, 4, None), (6, 6, 2)],
    pair=PAIR,
)
def test_calls(
    road: Road, layout: GqaLayout, head_counts: tuple[int, int], sizes: tuple[int, int, int | None], pair: bool
) -> None:
    (heads, kv_heads), (queries, keys, window) = head_counts, sizes
    q, k, v = random_inputs(heads, kv_heads, queries, keys)
    k = side_by_side(k) if pair else k
    request = Request.of(q, k, v, LAMBDA, causal=True, sliding_window=window, gqa_layout=layout)
    actual = flash2(request, road=road)
    bias = bias_of(None, heads, causal=True, window=window, queries=queries, keys=keys)
    expected = oracles.masked_diff_attention(
        q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias, legacy=layout == "legacy"
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)
    assert flash_attn_stand_in.calls == ["flash_attn_func"] * {"together": 1, "padded": 2, "split": 4}[road]


def test_the_road_follows_from_the_widths() -> None:
    assert road_for(64, 128, shares_keys=False) == road_for(128, 128, shares_keys=True) == Road.TOGETHER
    assert road_for(128, 256, shares_keys=False) == Road.SPLIT
    assert road_for(96, 128, shares_keys=False) == Road.PADDED
    assert [num_calls(width, 2 * width, shares_keys=False) for width in (64, 128)] == [1, 4]


def test_shared_keys_take_one_call() -> None:
    q, k, v = random_inputs(4, 2, 5, 5, shared_keys=True)
    lam = torch.rand(2, 4, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = flash2(Request.of(q, k, v, lam, causal=True))
    bias = bias_of(None, 4, causal=True, window=None, queries=5, keys=5)
    expected = oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), lam[..., 0].numpy(), bias)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)
    assert flash_attn_stand_in.calls == ["flash_attn_func"]


@pytest.mark.parametrize("road", Road)
@pytest.mark.parametrize("name", ["left", "right", "ragged", "all_hidden"])
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_padding_before_the_tokens_is_left_out(queries: int, name: str, road: Road) -> None:
    """Padding elsewhere, which the package does not know, goes through another implementation."""
    q, k, v = random_inputs(4, 2, queries, 7)
    mask = masks(queries, 7, 4)[name]
    request = Request.of(q, side_by_side(k), v, LAMBDA, causal=True, attn_mask=mask)
    assert unsupported_mask(request) is None
    actual = flash2(request, road=road)
    bias = bias_of(mask, 4, causal=True, window=None, queries=queries, keys=7)
    expected = oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)
    known = name in ("left", "all_hidden")
    calls = {"together": 1, "padded": 2, "split": 4}[road]
    assert flash_attn_stand_in.calls == ["flash_attn_with_kvcache"] * (calls if known else 0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 7, dtype=torch.bool), r"boolean \[B, 1, 1, 7\], but this one is torch.bool \[3, 7\]"),
        (torch.zeros(1, 1, 1, 7), "this one is torch.float32"),
    ],
    ids=["by-query", "additive"],
)
def test_masks_that_cannot_be_expressed(mask: torch.Tensor, message: str) -> None:
    reason = unsupported_mask(Request.of(*random_inputs(4, 2, 3, 7), LAMBDA, causal=True, attn_mask=mask))
    assert isinstance(reason, InputError)
    assert re.search(message, str(reason))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", [None, "left", "right", "all_hidden"])
@pytest.mark.parametrize("queries", [65, 9, 1])
@pytest.mark.parametrize("window", [None, 11], ids=["unlimited", "window"])
def test_the_real_package(dtype: torch.dtype, width: int, name: str | None, queries: int, window: int | None) -> None:
    pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 8, queries, width), (2, 4, 65, width), (2, 2, 65, 2 * width)]
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes)
    k = side_by_side(k)
    mask = None if name is None else masks(queries, 65, 4)[name].cuda()
    lam = torch.tensor(0.4, device="cuda")
    exact, plain, fast = (
        diff_attention(
            q.to(precision),
            k.to(precision),
            v.to(precision),
            lam.double(),
            causal=True,
            attn_mask=mask,
            sliding_window=window,
            impl=impl,
        )
        for impl, precision in (("naive", torch.float64), ("naive", dtype), ("flash2", dtype))
    )
    assert (fast - exact).square().mean().sqrt() <= 3 * (plain - exact).square().mean().sqrt()
