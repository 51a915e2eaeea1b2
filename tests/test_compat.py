"""The drop-in classes against formulas of their originals, with the originals' arguments and keys."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdeploy import compat
from diffdeploy.config import lambda_init_at
from diffdeploy.errors import InputError
from tests import oracles
from tests.support.operator_inputs import HEADS
from tests.support.pairwise import pairwise

SDPA = [compat.MultiheadSdpaDiff1, compat.MultiheadSdpaDiff2, compat.MultiheadSdpaDiff3, compat.MultiheadSdpaDiff4]
FLASH = [compat.MultiheadFlashDiff1, compat.MultiheadFlashDiff2]
CLASSES = {cls.__name__: cls for cls in (*SDPA, compat.MultiheadDiffAttn, *FLASH)}
KEYS = {
    *(f"{name}_proj.weight" for name in ("q", "k", "v", "out")),
    *(f"lambda_{name}" for name in ("q1", "k1", "q2", "k2")),
    "subln.weight",
}


def randomise(module: nn.Module) -> dict[str, Any]:
    """Give every parameter of an fp64 module random numbers; return them as arrays."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).double(), 100.0 ** (-torch.arange(0, width, 2).double() / width))
    return angles.cos(), angles.sin()


def expected_output(
    x: Tensor, weights: dict[str, Any], *, heads: int, kv_heads: int, depth: int, legacy: bool, rope: bool, bias: Any
) -> Any:
    width = len(weights["lambda_q1"])
    out = np.empty(x.shape)
    lambda_init = lambda_init_at(depth)
    lam = lambda_init + np.exp(weights["lambda_q1"] @ weights["lambda_k1"])
    lam -= np.exp(weights["lambda_q2"] @ weights["lambda_k2"])
    for row, sequence in enumerate(x.numpy()):
        q, k, v = (
            np.moveaxis((sequence @ weights[f"{n}_proj.weight"].T).reshape(len(sequence), count, -1), 1, 0)[None]
            for n, count in (("q", 2 * heads), ("k", 2 * kv_heads), ("v", kv_heads))
        )
        if rope:
            q, k = (np.stack([oracles.rotate(head, "interleaved", 100.0) for head in side[0]])[None] for side in (q, k))
        o = oracles.masked_diff_attention(q, k, v, np.array(lam), bias, legacy=legacy)[0]
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * weights["subln.weight"] * (1 - lambda_init)
        out[row] = np.moveaxis(o, 0, 1).reshape(len(sequence), 2 * width * heads) @ weights["out_proj.weight"].T
    return out


@pairwise(cls=CLASSES, head_counts=HEADS, rope={"rope": True, "norope": False})
def test_same_keys_and_results(cls: Any, head_counts: tuple[int, int], rope: bool) -> None:
    heads, kv_heads = head_counts
    doubled = 2 if cls in SDPA else 1
    module = cls(8 * heads, 3, doubled * heads, doubled * kv_heads).double()
    weights = randomise(module)
    assert weights.keys() == KEYS
    x = torch.randn(2, 5, 8 * heads, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = module(x, tables(9, 4) if rope else None).detach().numpy()
    bias = np.log(oracles.visible(5, 5, causal=True, window=None) + 1e-300)
    bias[bias < -1] = -np.inf
    expected = expected_output(
        x, weights, heads=heads, kv_heads=kv_heads, depth=3, legacy=cls not in FLASH, rope=rope, bias=bias
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


@pairwise(cls=CLASSES, additive={"additive": True, "boolean": False}, shape=[(1, 1, 5, 5), (5, 5), (1, 4, 5, 5)])
def test_masks(cls: Any, additive: bool, shape: tuple[int, ...]) -> None:
    doubled = 2 if cls in SDPA else 1
    module = cls(32, 1, doubled * 4, doubled * 2).double()
    weights = randomise(module)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    bias = np.where(seen.numpy(), 0.0, -np.inf)
    bias = np.repeat(bias, 2, axis=1) if bias.ndim == 4 and bias.shape[1] == 4 else bias
    if cls in FLASH:  # the originals are causal whatever they are given
        bias = bias + np.where(oracles.visible(5, 5, causal=True, window=None) > 0, 0.0, -np.inf)
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(shape, dtype=torch.float64).masked_fill(~seen, -float("inf")) if additive else seen
    actual = module(x, None, mask).detach().numpy()
    expected = expected_output(x, weights, heads=4, kv_heads=2, depth=1, legacy=cls not in FLASH, rope=False, bias=bias)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def test_the_readme_of_the_seed_project_runs() -> None:
    m = compat.MultiheadSdpaDiff2(768, 12, 12, 12)
    y = m(torch.randn(2, 3, 768))
    assert y.shape == (2, 3, 768)
    assert m(torch.randn(1, 1, 768)).shape == (1, 1, 768)


def test_version_2() -> None:
    module = compat.MultiheadFlashDiffV2(True, 16, 4, 2, 6).double()
    weights = randomise(module)
    assert weights.keys() == {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "lambda")}
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sequence = x[0].numpy()
    q, k, v = (
        np.moveaxis((sequence @ weights[f"{n}_proj.weight"].T).reshape(5, count, 6), 1, 0)
        for n, count in (("q", 8), ("k", 2), ("v", 2))
    )
    q, k = (np.stack([oracles.rotate(head, "interleaved", 100.0) for head in side]) for side in (q, k))
    lam = 1 / (1 + np.exp(-sequence @ weights["lambda_proj.weight"].T))
    heads = []
    for i in range(4):
        signal, noise = (oracles.attention(q[2 * i + s], k[i // 2], v[i // 2], causal=True) for s in (0, 1))
        heads.append(signal - lam[:, i : i + 1] * noise)
    expected = np.concatenate(heads, axis=1) @ weights["o_proj.weight"].T
    np.testing.assert_allclose(module(x, tables(5, 6))[0].detach().numpy(), expected, rtol=0, atol=1e-12)
    again = compat.MultiheadFlashDiffV2(True, 16, 4, 2, 6).double()
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: compat.MultiheadSdpaDiff1(32, 0, 4, 1), "num_kv_heads is 1; accepted: an even number"),
        (lambda: compat.MultiheadSdpaDiff1(32, 0, 5), "num_heads is 5"),
        (lambda: compat.MultiheadDiffAttn(30, 0, 4), "embed_dim is 30"),
        (lambda: compat.MultiheadFlashDiffV2(False, 32, 4, 2, 8), "plain attention"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
