"""Every implementation of the operator against the row-by-row formula: key maps, masks, windows and chunks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.ops import diff_attention
from tests import oracles
from tests.support.operator_inputs import (
    CAUSAL,
    HEADS,
    IMPLEMENTATIONS,
    PAIR,
    bias_of,
    masks,
    random_inputs,
    side_by_side,
)
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.usefixtures("_small_chunks")


def check(actual: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pairwise(impl=IMPLEMENTATIONS, layout=["canonical", "legacy"], head_counts=HEADS, pair=PAIR)
def test_both_key_maps(impl: str, layout: GqaLayout, head_counts: tuple[int, int], pair: bool) -> None:
    heads, kv_heads = head_counts
    q, k, v = random_inputs(heads, kv_heads, 5, 5)
    k = side_by_side(k) if pair else k
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
    causal=CAUSAL,
    lengths=[(5, 5), (3, 8), (1, 1), (1, 7)],
    pair=PAIR,
)
def test_masks(impl: str, name: str, causal: bool, lengths: tuple[int, int], pair: bool) -> None:
    queries, keys = lengths
    q, k, v = random_inputs(4, 2, queries, keys)
    k = side_by_side(k) if pair else k
    mask = masks(queries, keys, 4)[name]
    lam = torch.tensor(0.4, dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=causal, attn_mask=mask, impl=impl)
    bias = bias_of(mask, 4, causal=causal, window=None, queries=queries, keys=keys)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias))


@pairwise(
    impl=IMPLEMENTATIONS,
    window=[1, 2, 9],
    name=[None, "left", "additive", "per_head"],
    lengths=[(6, 6), (2, 7), (7, 3), (1, 9)],
    pair=PAIR,
)
def test_sliding_window(impl: str, window: int, name: str | None, lengths: tuple[int, int], pair: bool) -> None:
    queries, keys = lengths
    q, k, v = random_inputs(3, 1, queries, keys)
    k = side_by_side(k) if pair else k
    mask = None if name is None else masks(queries, keys, 3)[name]
    lam = torch.tensor(0.4, dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, sliding_window=window, impl=impl)
    bias = bias_of(mask, 3, causal=True, window=window, queries=queries, keys=keys)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), np.array(0.4), bias))


@pairwise(impl=IMPLEMENTATIONS, head_counts=HEADS, name=[None, "ragged", "per_head", "per_half_head"])
def test_shared_keys_and_lambda_per_token(impl: str, head_counts: tuple[int, int], name: str | None) -> None:
    heads, kv_heads = head_counts
    q, k, v = random_inputs(heads, kv_heads, 5, 5, shared_keys=True)
    mask = None if name is None else masks(5, 5, heads)[name]
    lam = torch.rand(2, heads, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, impl=impl)
    bias = bias_of(mask, heads, causal=True, window=None, queries=5, keys=5)
    check(actual, oracles.masked_diff_attention(q.numpy(), k.numpy(), v.numpy(), lam[..., 0].numpy(), bias))


@pytest.mark.parametrize(("queries", "keys", "window"), [(700, 700, None), (300, 900, None), (700, 700, 40)], ids=str)
def test_chunks_of_real_size(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, window: int | None) -> None:
    monkeypatch.undo()
    q, k, v = random_inputs(6, 2, queries, keys)
    settings: dict[str, Any] = {"causal": True, "sliding_window": window, "gqa_layout": "legacy"}
    lam = torch.rand(2, 6, queries, 1, dtype=torch.float64)
    two_calls = diff_attention(q, k, v, lam, **settings, impl="two_call")
    torch.testing.assert_close(diff_attention(q, k, v, lam, **settings, impl="chunked"), two_calls, rtol=0, atol=1e-12)
