"""No false alarm: random right blocks are exported in random ways, and every one must pass. Run by ``make slow``."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig, RopeConfig, RopeStyle, lambda_init_at
from diffdeploy.exporters import ExportOptions, export_bundle


def random_block(choose: random.Random) -> Checkpoint:
    kv_heads = choose.choice([1, 2, 3, 4])
    styles: list[RopeStyle | None] = ["interleaved", "half", None]
    style = choose.choice(styles)
    lambda_init = lambda_init_at(choose.randrange(30))
    config = DiffAttentionConfig(
        embed_dim=choose.choice([16, 48, 128, 256, 512, 768]),
        num_heads=kv_heads * choose.choice([1, 1, 2, 3]),
        num_kv_heads=kv_heads,
        head_dim=choose.choice([4, 8, 16, 32, 64]),
        lambda_init=lambda_init,
        output_scale=1 - lambda_init,
        causal=choose.random() < 0.8,
        rope=RopeConfig(style=style, theta=choose.choice([1e4, 5e5])) if style else None,
        norm_affine=choose.random() < 0.8,
        qkv_bias=choose.random() < 0.3,
        out_bias=choose.random() < 0.3,
        norm_eps=choose.choice([1e-5, 1e-6]),
    )
    generator = torch.Generator().manual_seed(choose.randrange(2**31))
    gain = choose.choice([0.5, 1.0, 2.0]) * config.embed_dim**-0.5
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if name.startswith("lambda") else gain)
        for name, shape in config.weight_shapes().items()
    }
    if config.norm_affine:
        weights["subln.weight"] = 1 + 0.2 * torch.randn(config.value_dim, generator=generator)
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_right_blocks_pass(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    used: dict[str, list[float]] = {"float32": [], "float16": []}
    for number in range(20):
        options = ExportOptions(
            dtype="float16" if choose.random() < 0.3 else "float32",
            opset=choose.choice([18, 20, 21, 23, 24]),
            impl=choose.choice(["two_call", "padded"]),
            max_sequence_length=choose.choice([16, 200, 512]),
            seed=number,
        )
        report = export_bundle(random_block(choose), tmp_path / str(number), options).report
        assert report is not None
        used[options.dtype] += [case.budget_used for case in report.cases if case.budget_used is not None]
    for dtype, shares in used.items():
        median, high = np.quantile(shares, [0.5, 0.99])
        print(f"{dtype}: {len(shares)} cases, budget used: median {median:.2f}, p99 {high:.2f}, max {max(shares):.2f}")
