"""The block that a benchmark compares with computes plain softmax attention."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffdeploy.bench import SOFTMAX_BLOCKS, Size
from diffdeploy.bench.candidate_run import formula_of, inputs_of, open_candidate
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.graphs import Variant
from diffdeploy.verify.oracle import oracle
from tests import oracles
from tests.support.benchmarks import make_plan


@pytest.mark.parametrize("impl", SOFTMAX_BLOCKS)
@pytest.mark.parametrize("graph", ["plain", "masked", "cached"])
def test_the_softmax_block_is_plain_attention(graph: Variant, impl: str, block: Checkpoint, tmp_path: Path) -> None:
    """Its output, and the exact result that it is held against, are what loops over heads and rows give."""
    size = Size(batch_size=2, sequence_length=5, past_sequence_length=4 if graph == "cached" else 0)
    plan = make_plan(block, tmp_path, size, graph=graph, impls=(impl,))
    config, weights = formula_of(plan, plan.candidates[0], block.weights)
    inputs = inputs_of(plan, config, size)
    expected = _plain_attention(block, {name: tensor.double().numpy() for name, tensor in inputs.items()})
    exact = oracle(
        config,
        {name: tensor.double().numpy() for name, tensor in weights.items()},
        {name: tensor.numpy() for name, tensor in inputs.items()},
    )["output"]
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)
    actual = open_candidate(plan, plan.candidates[0], block.weights)(inputs)["output"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def _plain_attention(block: Checkpoint, inputs: Mapping[str, Any]) -> Any:
    config, width = block.config, block.config.head_dim
    weights = {name: tensor.double().numpy() for name, tensor in block.weights.items()}
    num_heads, num_kv_heads = 2 * config.num_heads, 2 * config.num_kv_heads
    rows = []
    for b, x in enumerate(inputs["hidden_states"]):
        q, k, v = (np.moveaxis((x @ weights[f"{n}_proj.weight"].T).reshape(len(x), -1, width), 1, 0) for n in "qkv")
        past = inputs["past_key_values.key"].shape[2] if "past_key_values.key" in inputs else 0
        positions = inputs["position_ids"][b].astype(int) if "position_ids" in inputs else np.arange(len(x))
        q, k = (np.stack([_turned(head, positions) for head in side]) for side in (q, k))
        if past:
            k = np.concatenate((inputs["past_key_values.key"][b], k), axis=1)
            v = np.concatenate((inputs["past_key_values.value"][b], v), axis=1)
        bias = np.where(oracles.visible(len(x), past + len(x), causal=True, window=None) > 0, 0.0, -np.inf)
        if "attention_mask" in inputs:
            bias = np.where(inputs["attention_mask"][b] > 0, bias, -np.inf)
        heads = np.zeros((num_heads, len(x), width))
        for head, row in np.ndindex(num_heads, len(x)):
            kv = head * num_kv_heads // num_heads
            scores = k[kv] @ q[head, row] / np.sqrt(width) + bias[row]
            if not np.isneginf(scores).all():
                heads[head, row] = oracles.softmax_row(scores) @ v[kv]
        rows.append(np.moveaxis(heads, 0, 1).reshape(len(x), -1) @ weights["out_proj.weight"].T)
    return np.stack(rows)


def _turned(head: Any, positions: Any) -> Any:
    table = np.zeros((int(positions.max()) + 1, head.shape[1]))
    turned = np.empty_like(head)
    for row, position in enumerate(positions):
        table[position] = head[row]
        turned[row] = oracles.rotate(table, "interleaved", 10000.0)[position]
    return turned
