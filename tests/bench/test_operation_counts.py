"""Counted operations, against loops and torch's own counter."""

from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffdeploy.bench import SOFTMAX, Size
from diffdeploy.bench.candidate_run import formula_of, inputs_of, open_candidate
from diffdeploy.bench.operations import attention_flop, block_flop, num_pairs, projection_flop
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig
from tests import oracles
from tests.support.benchmarks import make_plan
from tests.support.blocks import make_config


@pytest.mark.parametrize(
    ("causal", "window", "length", "past"),
    [(True, None, 5, 0), (True, None, 1, 9), (True, None, 4, 3), (True, 3, 6, 2), (False, None, 4, 0)],
    ids=["causal", "step", "chunk", "window", "full"],
)
def test_counted_pairs(causal: bool, window: int | None, length: int, past: int) -> None:
    config = make_config(causal=causal, sliding_window=window)
    size = Size(batch_size=1, sequence_length=length, past_sequence_length=past)
    assert num_pairs(config, size) == oracles.visible(length, past + length, causal=causal, window=window).sum()


def test_operations_are_those_that_torch_counts(block: Checkpoint, tmp_path: Path) -> None:
    """torch counts masked pairs too, so nothing is masked here; matrix products only, as the formula does."""
    size = Size(batch_size=2, sequence_length=16)
    assert isinstance(block.config, DiffAttentionConfig)
    fields = {**vars(block.config), "causal": False, "rope": None}
    plan = make_plan(
        Checkpoint(**{**vars(block), "config": DiffAttentionConfig(**fields)}),
        tmp_path,
        size,
        impls=("two_call", SOFTMAX),
    )
    for candidate in plan.candidates:
        config, _ = formula_of(plan, candidate, block.weights)
        inputs = inputs_of(plan, config, size)
        run = open_candidate(plan, candidate, block.weights)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(inputs)
        assert block_flop(plan.config, size, candidate) == counter.get_total_flops()
    pairs = 2 * 16 * 16 * plan.config.num_heads
    assert attention_flop(plan.config, size) == 12 * plan.config.head_dim * pairs
    assert projection_flop(plan.config, size) + attention_flop(plan.config, size) == block_flop(
        plan.config, size, plan.candidates[0]
    )
