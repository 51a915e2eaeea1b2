"""Checkpoints of the code bases that have layouts, and the results of their blocks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdeploy.checkpoints import (
    Checkpoint,
    CheckpointOptions,
)
from diffdeploy.config import lambda_init_at
from diffdeploy.modules import block_class
from tests.source_oracles import HALVES, PAIRS, REPEATED, Reads, Shape, forward

LAYER = 3


def random_state(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(size, generator=generator, dtype=torch.float64) * (0.2 if "lambda" in name else 0.5)
        for name, size in shapes.items()
    }


def lambdas(shape: Shape, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}lambda_{name}": (shape.width,) for name in ("q1", "k1", "q2", "k2")}


def separate(shape: Shape, output: str, *, bias: bool = False, norm: str | None = None) -> dict[str, tuple[int, ...]]:
    rows = {"q": 2 * shape.heads * shape.width, "k": 2 * shape.kv_heads * shape.width}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {f"{n}_proj.weight": (count, shape.embed_dim) for n, count in rows.items()}
    shapes |= {f"{n}_proj.bias": (count,) for n, count in rows.items() if bias}
    shapes[f"{output}.weight"] = (shape.embed_dim, rows["q"])
    if bias:
        shapes[f"{output}.bias"] = (shape.embed_dim,)
    return shapes | lambdas(shape) | ({norm: (2 * shape.width,)} if norm else {})


def packed(shape: Shape, name: str, output: str, *, bias: bool) -> dict[str, tuple[int, ...]]:
    rows = 2 * (shape.heads + 2 * shape.kv_heads) * shape.width
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (rows, shape.embed_dim),
        f"{output}.weight": (shape.embed_dim, 2 * shape.heads * shape.width),
    }
    return shapes | ({f"{name}.bias": (rows,), f"{output}.bias": (shape.embed_dim,)} if bias else {})


class Source:
    """A code base: how its blocks are stored, and what they compute."""

    def __init__(
        self,
        layout: str,
        shapes: Callable[[Shape], dict[str, tuple[int, ...]]],
        reads: Reads,
        *,
        output: str,
        fields: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        prefix: str = f"model.layers.{LAYER}.self_attn.",
        pack: str | None = None,
        vectors: str = "",
        norm: str | None = None,
        depth: int = LAYER,
        **rules: Any,
    ) -> None:
        self.layout, self.shapes, self.reads, self.output = layout, shapes, reads, output
        self.fields, self.options, self.prefix = fields or {}, CheckpointOptions(**(options or {})), prefix
        self.pack, self.vectors, self.norm, self.depth, self.rules = pack, vectors, norm, depth, rules

    def run(self, state: dict[str, Tensor], shape: Shape, x: Any) -> Any:
        w = {name.removeprefix(self.prefix): tensor.numpy() for name, tensor in state.items()}
        if self.pack:
            rows = x @ w[f"{self.pack}.weight"].T + w.get(f"{self.pack}.bias", 0.0)
            q_rows, kv_rows = 2 * shape.heads * shape.width, 2 * shape.kv_heads * shape.width
            projections = rows[:, :q_rows], rows[:, q_rows : q_rows + kv_rows], rows[:, q_rows + kv_rows :]
        else:
            q, k, v = (x @ w[f"{n}_proj.weight"].T + w.get(f"{n}_proj.bias", 0.0) for n in "qkv")
            projections = q, k, v
        lambda_init = lambda_init_at(self.depth)
        if "lambda_a" in w:
            lam = np.exp(w["lambda_a"]) - np.exp(w["lambda_b"]) + lambda_init
        else:
            q1, k1, q2, k2 = (w[f"{self.vectors}lambda_{n}"] for n in ("q1", "k1", "q2", "k2"))
            lam = np.exp(q1 @ k1) - np.exp(q2 @ k2) + lambda_init
        return forward(
            x,
            shape,
            self.reads,
            projections,
            float(lam),
            lambda_init,
            output=(w[f"{self.output}.weight"], w.get(f"{self.output}.bias", 0.0)),
            gamma=w[self.norm] if self.norm else 1.0,
            head_norms=(w["q_norm.weight"], w["k_norm.weight"]) if "q_norm.weight" in w else None,
            **self.rules,
        )


GIVEN = {"rope": "interleaved", "rope_theta": 100.0}


HF = {"rms_norm_eps": 1e-6, "rope_theta": 100.0}


SOURCES = {
    "microsoft-flash": Source(
        "microsoft",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        PAIRS,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "gqa_layout": "canonical"},
        rope=("interleaved", 100.0),
    ),
    "microsoft-naive": Source(
        "microsoft",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        REPEATED,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "gqa_layout": "legacy"},
        rope=("interleaved", 100.0),
    ),
    "microsoft-early": Source(
        "microsoft",
        lambda c: separate(c, "out_proj"),
        PAIRS,
        output="out_proj",
        options={"rope": "none", "gqa_layout": "canonical"},
    ),
    "sdpadiff": Source(
        "sdpadiff",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        REPEATED,
        output="out_proj",
        norm="subln.weight",
        options={**GIVEN, "layout": "sdpadiff"},
        rope=("interleaved", 100.0),
    ),
    "diffdeploy": Source(
        "diffdeploy",
        lambda c: separate(c, "out_proj", norm="subln.weight"),
        PAIRS,
        output="out_proj",
        norm="subln.weight",
        fields={"model_type": "diffdeploy", "rope": {"style": "half", "theta": 100.0}, "norm_eps": 1e-4},
        rope=("half", 100.0),
        eps=1e-4,
    ),
    "diffllama": Source(
        "diffllama",
        lambda c: separate(c, "o_proj"),
        HALVES,
        output="o_proj",
        fields={"model_type": "diffllama", **HF},
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "diffllama-bias": Source(
        "diffllama",
        lambda c: separate(c, "o_proj", bias=True),
        HALVES,
        output="o_proj",
        fields={"model_type": "diffllama", **HF},
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "phi4flash": Source(
        "phi4flash",
        lambda c: (
            packed(c, "Wqkv", "out_proj", bias=True)
            | lambdas(c, "inner_cross_attn.")
            | {"inner_cross_attn.subln.weight": (2 * c.width,)}
        ),
        PAIRS,
        output="out_proj",
        pack="Wqkv",
        vectors="inner_cross_attn.",
        norm="inner_cross_attn.subln.weight",
        prefix=f"model.layers.{LAYER}.attn.",
        fields={"model_type": "phi4flash", "sliding_window": 3, "num_hidden_layers": 32},
        window=3,
    ),
    "motif": Source(
        "motif",
        lambda c: separate(c, "o_proj", norm="subln.weight"),
        PAIRS,
        output="o_proj",
        norm="subln.weight",
        fields={"model_type": "motif", "attn_rms_norm_eps": 1e-6, "rope_theta": 100.0},
        depth=LAYER - 1,
        rope=("half", 100.0),
        eps=1e-6,
    ),
    "timm": Source(
        "timm",
        lambda c: packed(c, "qkv", "proj", bias=True) | lambdas(c) | {"sub_norm.weight": (2 * c.width,)},
        PAIRS,
        output="proj",
        pack="qkv",
        norm="sub_norm.weight",
        prefix=f"blocks.{LAYER}.attn.",
        causal=False,
    ),
    "timm-dual": Source(
        "timm-dual",
        lambda c: (
            packed(c, "qkv", "proj", bias=False)
            | {"lambda_a": (), "lambda_b": (), "sub_norm.weight": (2 * c.width,)}
            | {"q_norm.weight": (c.width,), "k_norm.weight": (c.width,)}
        ),
        PAIRS,
        output="proj",
        pack="qkv",
        norm="sub_norm.weight",
        prefix=f"blocks.{LAYER}.attn.",
        causal=False,
    ),
}


def store(folder: Path, source: Source, shape: Shape) -> dict[str, Tensor]:
    state = random_state(source.shapes(shape), source.prefix)
    save_file(state, folder / "model.safetensors")
    if source.fields:
        (folder / "config.json").write_text(json.dumps(source.fields))
    return state


def run_block(found: Checkpoint, x: Any) -> Any:
    block = block_class(found.config).from_weights(
        found.config, found.weights, impl="two_call", max_positions=16, dtype=torch.float64
    )
    return block(torch.from_numpy(x)[None])[0].numpy()
