"""Random calls of `fused`, their expected results, and the error budget that they must meet."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdeploy.arrays import to_array
from diffdeploy.graphs import DType
from diffdeploy.ops import diff_attention
from diffdeploy.verify.metrics import Yardstick, measure
from tests import oracles
from tests.support.operator_inputs import bias_of

__all__ = ["Case", "case_of", "check", "random_case"]

# Stream and value widths: those of models, and some that do not fill a tile.
WIDTHS = [(16, 32), (32, 64), (64, 128), (128, 256), (96, 192), (128, 128), (64, 64), (24, 40), (20, 20), (128, 48)]
LENGTHS = [1, 1, 2, 5, 16, 17, 64, 100, 129, 200]
BEHIND = [0, 0, 0, 1, 7, 64, 150, -3]


@dataclass(frozen=True)
class Case:
    """Inputs in fp64 that the dtype can represent exactly, and the settings of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    lam: Tensor
    settings: dict[str, Any]
    dtype: DType

    def run(self, device: str, impl: str) -> Tensor:
        """Compute the operator in the dtype."""
        sides = (side.to(device, getattr(torch, self.dtype)) for side in (self.q, self.k, self.v, self.lam))
        mask = self.settings["attn_mask"]
        settings = {**self.settings, "attn_mask": None if mask is None else mask.to(device)}
        return diff_attention(*sides, **settings, impl=impl).cpu()

    def formula(self, lam: float | None = None) -> Any:
        """Compute the operator row by row, with ``lam`` in place of the case's own lambda, if given."""
        heads, mask = self.q.shape[1] // 2, self.settings["attn_mask"]
        bias = bias_of(
            None if mask is None else mask.cpu(),
            heads,
            causal=self.settings["causal"],
            window=self.settings["sliding_window"],
            queries=self.q.shape[2],
            keys=self.k.shape[2],
        )
        own = self.lam.numpy()[..., 0] if self.lam.ndim == 4 else self.lam.numpy()
        return oracles.masked_diff_attention(
            self.q.numpy(),
            self.k.numpy(),
            self.v.numpy(),
            own if lam is None else np.array(lam),
            bias,
            legacy=self.settings["gqa_layout"] == "legacy",
        )


def case_of(
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    dtype: DType,
    *,
    widths: tuple[int, int] = (16, 32),
    form: str = "streams",
    batch: int = 2,
    seed: int = 0,
    lam: str = "scalar",
    **settings: Any,
) -> Case:
    """Case of random numbers that the dtype can represent; ``lam`` is ``scalar``, ``by_head`` or ``by_token``."""
    generator, (width, value_width) = torch.Generator().manual_seed(seed), widths

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)).double()

    key_heads, key_width = {
        "streams": (2 * kv_heads, width),
        "paired": (kv_heads, 2 * width),
        "shared": (kv_heads, width),
    }[form]
    # In memory, the axis of heads is inside that of positions, as projections leave it, or outside, as in a cache.
    q, k = numbers(batch, queries, 2 * heads, width).transpose(1, 2), numbers(batch, key_heads, keys, key_width)
    v, by_token = numbers(batch, kv_heads, keys, value_width), numbers(batch, heads, queries, 1)
    lambdas = {
        "scalar": by_token[0, 0, 0, 0],
        "by_head": by_token[:1, :, :1].expand(-1, -1, queries, -1),
        "by_token": by_token,
    }
    plain = {"causal": True, "sliding_window": None, "gqa_layout": "canonical", "attn_mask": None, "scale": None}
    return Case(q, k, v, lambdas[lam], plain | settings, dtype)


def random_case(seed: int, dtype: DType) -> Case:
    """Draw a case with random sizes, forms of keys, masks and lambdas, always the same for a seed."""
    draw, generator = Random(seed), torch.Generator().manual_seed(seed)
    width, value_width = draw.choice(WIDTHS)
    kv_heads, group_size, batch = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 2])
    queries, causal = draw.choice(LENGTHS), draw.random() < 0.7
    keys = max(1, queries + draw.choice(BEHIND))
    padding = torch.rand(batch, 1, 1, keys, generator=generator) > draw.choice([0.2, 0.6])
    return case_of(
        kv_heads * group_size,
        kv_heads,
        queries,
        keys,
        dtype,
        widths=(width, value_width),
        form=draw.choice(["streams", "paired", "shared"]),
        batch=batch,
        seed=seed,
        lam=draw.choice(["scalar", "by_head", "by_token"]),
        causal=causal,
        sliding_window=draw.choice([None, None, 1, 9, 70]) if causal else None,
        gqa_layout=draw.choice(["canonical", "legacy"]),
        attn_mask=draw.choice([None, None, padding, padding[:1], padding[0, 0, 0]]),
        scale=draw.choice([None, None, 0.3]),
    )


def check(case: Case, actual: Tensor, device: str) -> None:
    """Check that a result is within the budget of the dtype, as for artifacts, and 0 where a query sees nothing."""
    scaled = case if case.settings["scale"] is None else _with_own_scale(case)
    signal = scaled.formula(0.0)
    noise = signal - scaled.formula(1.0)
    lam = np.broadcast_to(case.lam.numpy(), (*signal.shape[:3], 1))
    yardstick = Yardstick(signal - lam * noise, case.dtype)
    yardstick.add(to_array(case.run(device, "naive")))
    stored_signal, stored_noise = (side.astype(case.dtype).astype(np.float64) for side in (signal, noise))
    yardstick.add_stored(stored_signal - lam * stored_noise)
    report = measure("output", to_array(actual), yardstick)
    assert report.passed, report
    dead = torch.from_numpy((signal == 0.0).all(axis=-1) & (noise == 0.0).all(axis=-1))
    assert (actual[dead] == 0.0).all()


def _with_own_scale(case: Case) -> Case:
    """Multiply another scale into the queries, since the formula itself divides scores by the root of the width."""
    factor = case.settings["scale"] * case.q.shape[-1] ** 0.5
    return Case(case.q * factor, case.k, case.v, case.lam, case.settings, case.dtype)
