"""The eager block and the operator against the loop formulas of `tests.oracles`."""

from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.config import RopeConfig
from diffdeploy.errors import InputError
from diffdeploy.modules import DiffAttention
from diffdeploy.ops import diff_attention
from tests import oracles
from tests.support.blocks import make_config, random_weights
from tests.support.operator_inputs import CAUSAL, IMPLEMENTATIONS
from tests.support.pairwise import pairwise


@pairwise(
    impl=IMPLEMENTATIONS,
    causal=CAUSAL,
    head_counts=[(4, 4), (4, 2), (6, 3), (3, 1)],
    lengths=[(1, 1), (5, 5), (3, 8), (1, 7)],
)
def test_operator_matches_formula(
    impl: str, causal: bool, head_counts: tuple[int, int], lengths: tuple[int, int]
) -> None:
    (heads, kv_heads), (queries, keys) = head_counts, lengths
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    q, k, v = (
        torch.randn(2, count, length, width, generator=generator, dtype=torch.float64)
        for count, length, width in ((2 * heads, queries, 6), (2 * kv_heads, keys, 6), (kv_heads, keys, 12))
    )
    lam = torch.tensor(0.37, dtype=torch.float64)
    expected = oracles.diff_attention(q.numpy(), k.numpy(), v.numpy(), 0.37, causal=causal)
    actual = diff_attention(q, k, v, lam, causal=causal, impl=impl).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pairwise(
    impl=IMPLEMENTATIONS,
    style=["interleaved", "half", None],
    affine={"gamma": True, "plain": False},
    bias={"bias": True, "nobias": False},
)
def test_block_matches_formula(impl: str, style: Any, affine: bool, bias: bool) -> None:
    rope = RopeConfig(style=style, theta=100.0) if style else None
    config = make_config(rope=rope, norm_affine=affine, qkv_bias=bias, out_bias=bias)
    weights = random_weights(config)
    block = DiffAttention.from_weights(config, weights, impl=impl, max_positions=16, dtype=torch.float64)
    x = torch.randn(2, 9, config.embed_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    for row, sequence in enumerate(x.numpy()):
        expected = oracles.block(
            sequence,
            arrays,
            heads=4,
            kv_heads=2,
            lambda_init=0.35,
            causal=True,
            rope=(style, 100.0) if style else None,
        )
        np.testing.assert_allclose(block(x)[row].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_stays_near_fp64(impl: str, dtype: torch.dtype) -> None:
    config = make_config()
    weights = {name: w.to(dtype) for name, w in random_weights(config).items()}
    exact = DiffAttention.from_weights(config, weights, max_positions=32, dtype=torch.float64)
    block = DiffAttention.from_weights(config, weights, impl=impl, max_positions=32, dtype=dtype)
    x = torch.randn(1, 17, config.embed_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected, actual = exact(x.double()), block(x)
    assert actual.dtype == dtype
    rms_error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert rms_error < 16 * torch.finfo(dtype).eps


def test_lambda_vectors_stay_fp32_in_a_half_precision_block() -> None:
    block = DiffAttention(make_config(), dtype=torch.bfloat16)
    assert block.lambda_q1.dtype == torch.float32
    assert block.q_proj.weight.dtype == torch.bfloat16


def test_rotary_tables_are_rounded_once_after_a_change_of_dtype() -> None:
    block = DiffAttention(make_config(), max_positions=64).half().double()
    assert block.rotary is not None
    angle = 63 / 100 ** (2 / 6)
    assert block.rotary.cos[63, 1].item() == pytest.approx(np.cos(angle), abs=1e-14)


def test_sequence_longer_than_the_tables_is_refused() -> None:
    block = DiffAttention(make_config(), max_positions=4)
    with pytest.raises(InputError, match="ends at position 5, but the rotary tables hold 4"):
        block(torch.zeros(1, 5, 24))


def test_unknown_implementation_is_refused() -> None:
    block = DiffAttention(make_config(), impl="fast")
    with pytest.raises(InputError, match="'fast' is not known; accepted: auto, naive, chunked, two_call, padded"):
        block(torch.zeros(1, 5, 24))
