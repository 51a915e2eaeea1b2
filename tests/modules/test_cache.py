"""The cache of a block, and of the exact formula: both key streams of a head side by side, after rotary embedding."""

from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.config import GqaLayout, RopeConfig
from diffdeploy.exporters.tracing import trace
from diffdeploy.graphs import Stage, graph_spec, run_graph
from diffdeploy.locate.values import stage_values
from diffdeploy.modules import DiffAttention
from diffdeploy.verify.cases import Case
from diffdeploy.verify.oracle import oracle
from tests import oracles
from tests.support.blocks import make_config, random_weights
from tests.support.operator_inputs import IMPLEMENTATIONS
from tests.support.pairwise import pairwise

OUTPUTS = ("output", "present.key", "present.value")
LENGTHS = [(1, 7), (1, 0), (3, 5), (4, 0)]
HEADS = [(3, 3), (4, 2), (3, 1), (4, 1)]
STYLES = ["interleaved", "half"]


class Formula:
    """One block, inputs behind a past, and what the loops make of them."""

    def __init__(self, heads: tuple[int, int], layout: GqaLayout, style: Any, length: int, past: int) -> None:
        rope = RopeConfig(style=style, theta=100.0)
        self.config = make_config(num_heads=heads[0], num_kv_heads=heads[1], gqa_layout=layout, rope=rope)
        self.spec = graph_spec("cached", self.config, dtype="float32", max_batch_size=4, max_sequence_length=30)
        self.weights = random_weights(self.config)
        self.arrays = {name: tensor.numpy() for name, tensor in self.weights.items()}
        self.inputs = Case(batch_size=2, sequence_length=length, past_length=past, seed=0).inputs(self.spec)
        rows = [
            oracles.cached_block(
                *(self.inputs["hidden_states"][b].astype(np.float64), self.arrays),
                *(self.inputs[f"past_key_values.{side}"][b].astype(np.float64) for side in ("key", "value")),
                lambda_init=0.35,
                rope=(style, 100.0),
                legacy=layout == "legacy",
            )
            for b in range(2)
        ]
        self.expected = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(OUTPUTS)}


@pairwise(impl=[*IMPLEMENTATIONS, "auto"], layout=["canonical", "legacy"], heads=HEADS, style=STYLES, lengths=LENGTHS)
def test_blocks(impl: str, layout: GqaLayout, heads: tuple[int, int], style: str, lengths: tuple[int, int]) -> None:
    formula = Formula(heads, layout, style, *lengths)
    block = DiffAttention.from_weights(
        formula.config, formula.weights, impl=impl, max_positions=30, dtype=torch.float64
    )
    outputs = run_graph(block, {name: _exact(torch.from_numpy(array)) for name, array in formula.inputs.items()})
    for name, expected in formula.expected.items():
        np.testing.assert_allclose(outputs[name].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["canonical", "legacy"])
def test_a_graph_goes_by_the_number_of_tokens(layout: GqaLayout) -> None:
    """One exported graph computes one token as products of matrices, and more as an attention."""
    formula = Formula((4, 2), layout, "half", 1, 0)
    block = DiffAttention.from_weights(formula.config, formula.weights, impl="rows", max_positions=30)
    program = trace(block, formula.spec)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.higher_order.cond) == 1
    for lengths in [*LENGTHS, (2, 9)]:
        formula = Formula((4, 2), layout, "half", *lengths)
        tensors = [torch.from_numpy(array) for array in formula.inputs.values()]
        for name, actual in zip(formula.expected, program.module()(*tensors), strict=True):
            np.testing.assert_allclose(actual.numpy(), formula.expected[name], rtol=0, atol=1e-5)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@pairwise(layout=["canonical", "legacy"], heads=HEADS, style=STYLES, lengths=LENGTHS)
def test_what_artifacts_are_held_against(
    layout: GqaLayout, heads: tuple[int, int], style: str, lengths: tuple[int, int]
) -> None:
    formula = Formula(heads, layout, style, *lengths)
    exact = oracle(formula.config, formula.arrays, formula.inputs)
    stages = stage_values(formula.config, formula.arrays, formula.inputs, torch.float64)
    shown = dict(zip(OUTPUTS, (stages[Stage.OUTPUT_PROJECTION][0][:, 0], *stages[Stage.CACHE]), strict=True))
    for name, expected in formula.expected.items():
        assert exact[name].shape == expected.shape
        np.testing.assert_allclose(exact[name], expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(shown[name].numpy(), expected, rtol=0, atol=1e-12)
