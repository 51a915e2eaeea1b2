"""Keys side by side, ``[k1 | k2]``: one token behind a cache, in every dtype, and keys that are not finite."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdeploy.config import GqaLayout
from diffdeploy.errors import InputError
from diffdeploy.ops import diff_attention
from diffdeploy.ops.heads import pair_streams, separate_streams
from tests import oracles
from tests.support.operator_inputs import HEADS, IMPLEMENTATIONS, bias_of, masks, random_inputs, side_by_side
from tests.support.pairwise import pairwise

WHOLE = ["padded", "paired", "rows"]


def lambdas(heads: int, queries: int) -> Tensor:
    return torch.rand(2, heads, queries, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def exact(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, bias: Any, *, layout: GqaLayout = "canonical") -> Any:
    q, k, v, lam = (side.double() for side in (q, k, v, lam))
    sides = (q.numpy(), k.numpy(), v.numpy(), lam[..., 0].numpy())
    return oracles.masked_diff_attention(*sides, bias, legacy=layout == "legacy")


def test_pairs_are_both_streams_of_a_head() -> None:
    _, k, _ = random_inputs(6, 3, 1, 7)
    assert torch.equal(pair_streams(k), side_by_side(k))
    assert torch.equal(separate_streams(side_by_side(k)), k)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS, ids=str)
def test_one_token_reads_the_keys_of_its_stream(impl: str, layout: GqaLayout, heads: int, kv_heads: int) -> None:
    q, k, v = random_inputs(heads, kv_heads, 1, 9)
    k, lam = side_by_side(k), lambdas(heads, 1)
    mask = masks(1, 9, heads)["per_half_head"]
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, gqa_layout=layout, impl=impl)
    bias = bias_of(mask, heads, causal=True, window=None, queries=1, keys=9)
    np.testing.assert_allclose(actual.numpy(), exact(q, k, v, lam, bias, layout=layout), rtol=0, atol=1e-12)


@pairwise(
    impl=IMPLEMENTATIONS,
    dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
    lengths=[(1, 1), (1, 70), (5, 5), (3, 40), (40, 41)],
    name=[None, "left", "additive"],
    keys=["paired", "shared"],
)
def test_low_precision(impl: str, dtype: torch.dtype, lengths: tuple[int, int], name: str | None, keys: str) -> None:
    """The error against the formula on the same rounded numbers is a few roundings."""
    queries, length = lengths
    q, k, v = random_inputs(4, 2, queries, length, dtype=dtype, shared_keys=keys == "shared")
    k, lam = side_by_side(k) if keys == "paired" else k, lambdas(4, queries).to(dtype)
    mask = None if name is None else masks(queries, length, 4)[name]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).double()
    actual = diff_attention(q, k, v, lam, causal=True, attn_mask=mask, impl=impl)
    assert actual.dtype == dtype
    expected = exact(q, k, v, lam, bias_of(mask, 4, causal=True, window=None, queries=queries, keys=length))
    # 16, as for keys of streams: two roundings of probabilities and outputs, and what a cancellation makes of them.
    assert np.abs(actual.double().numpy() - expected).max() <= 16 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_an_infinite_key_spoils_what_reads_the_other_half_of_its_pair(
    impl: str, layout: GqaLayout, dtype: torch.dtype, queries: int
) -> None:
    """0 times infinity is NaN: what reads pairs as they are loses these heads, as the docstring says, and no others.

    Every query has a negative number where the key is infinite, so that its score is minus infinity, and an
    implementation that keeps the streams apart does as if the key were hidden from it.
    """
    q, k, v = random_inputs(4, 2, queries, 8, dtype=dtype)
    q[..., 0] = -q[..., 0].abs() - 1
    k[0, 0, 2, 0] = float("inf")
    actual = diff_attention(q, side_by_side(k), v, torch.tensor(0.4), causal=False, gqa_layout=layout, impl=impl)
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    # Both heads of the group read the other half with their noise; in the legacy map the second with both streams.
    spoilt[0, [0, 1] if layout == "canonical" else [1]] = impl in WHOLE
    assert torch.equal(actual.isnan().all(-1).all(-1), spoilt)
    assert torch.isfinite(actual[~spoilt]).all()


def test_pairs_that_do_not_fit_are_refused() -> None:
    q, k, v = random_inputs(4, 2, 3, 5)
    with pytest.raises(InputError, match=r"do not fit; .* h_kv, T, 2d"):
        diff_attention(q, side_by_side(k)[..., :7], v, torch.tensor(0.4), causal=True)
