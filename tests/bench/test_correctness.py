"""Whether a candidate is right: right ones pass, and wrong ones do not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdeploy.bench import SOFTMAX, Size, correctness
from diffdeploy.bench.candidate_run import formula_of, inputs_of, open_candidate
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.graphs import DType, Variant
from diffdeploy.ops import Impl
from tests.support.benchmarks import make_plan


def _spoilt(run: Any, name: str) -> Any:
    def spoilt(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = dict(run(inputs))
        outputs[name] = outputs[name].clone()
        outputs[name].flatten()[-1] += 1e-3
        return outputs

    return spoilt


@pytest.mark.parametrize("largest", [2**27, 0], ids=["oracle", "fp64-block"])
@pytest.mark.parametrize("graph", ["plain", "masked", "cached"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_candidates_pass_and_wrong_ones_do_not(
    graph: Variant, dtype: DType, largest: int, block: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "MAX_ORACLE_SCORES", largest)
    size = Size(batch_size=2, sequence_length=9, past_sequence_length=7 if graph == "cached" else 0)
    impls = tuple(impl.value for impl in Impl if impl not in (Impl.FLASH2, Impl.FUSED))  # which need CUDA
    plan = make_plan(block, tmp_path, size, graph=graph, dtype=dtype, impls=(*impls, SOFTMAX))
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in block.weights.items()}
    for candidate in plan.candidates:
        config, own_weights = formula_of(plan, candidate, weights)
        inputs = inputs_of(plan, config, size)
        expected = correctness.expected_outputs(plan, config, own_weights, inputs, size)
        run = open_candidate(plan, candidate, weights)
        verdict = correctness.judge_candidate(run, inputs, expected)
        assert verdict.passed, (candidate.name, verdict)
        assert verdict.budget_used is not None
        assert verdict.budget_used < 0.6
        if dtype == "float32":
            for name in expected:
                wrong = correctness.judge_candidate(_spoilt(run, name), inputs, expected)
                assert not wrong.passed, (candidate.name, name)


def test_a_candidate_that_raises_is_wrong(block: Checkpoint, tmp_path: Path) -> None:
    size = Size(batch_size=1, sequence_length=4)
    plan = make_plan(block, tmp_path, size)
    inputs = inputs_of(plan, plan.config, size)
    expected = correctness.expected_outputs(plan, plan.config, block.weights, inputs, size)

    def broken(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no kernel")

    assert correctness.judge_candidate(broken, inputs, expected).reason == "it did not run: RuntimeError: no kernel"
