"""What is measured, and what does not fit into memory."""

from pathlib import Path

import pytest

from diffdeploy.bench import SOFTMAX, Size
from diffdeploy.bench.candidate_choice import choose_baseline, choose_names, eager_candidates
from diffdeploy.bench.estimate import candidate_bytes, require_memory
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionV2Config
from diffdeploy.errors import InputError, UnavailableError
from tests.support.benchmarks import make_plan
from tests.support.operator_inputs import IMPLEMENTATIONS


def test_what_is_measured_is_chosen_by_name(block: Checkpoint) -> None:
    assert choose_names("format", ["all"], ("a", "b")) == ["a", "b"]
    assert choose_names("format", ["none"], ("a", "b")) == []
    with pytest.raises(InputError, match="format 'c' is not known; accepted: a, b, all or none"):
        choose_names("format", ["a", "c"], ("a", "b"))
    found = eager_candidates(["all"], block.config, device="cpu", dtype="float32")
    assert [candidate.name for candidate in found] == [*IMPLEMENTATIONS, "auto", "softmax", "softmax-compiled"]
    with pytest.raises(UnavailableError, match="flash2 runs on CUDA only"):
        eager_candidates(["flash2"], block.config, device="cpu", dtype="float16")
    second = DiffAttentionV2Config(embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
    with pytest.raises(InputError, match="of the second"):
        eager_candidates([SOFTMAX], second, device="cpu", dtype="float32")
    assert choose_baseline(None, found) == "naive"
    assert choose_baseline(None, found[2:]) == "two_call"
    with pytest.raises(InputError, match="baseline 'x' is not among the candidates"):
        choose_baseline("x", found)
    with pytest.raises(InputError, match="nothing to measure"):
        choose_baseline(None, [])
    with pytest.raises(InputError, match="two candidates are called naive"):
        choose_baseline(None, [found[0], found[0]])


def test_sizes_that_do_not_fit_are_refused(block: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(block, tmp_path, Size(batch_size=1, sequence_length=4096), impls=("padded", "naive"))
    scores = 4096**2 * plan.config.num_heads * 4
    assert candidate_bytes(plan, plan.candidates[1], plan.sizes[0]) > 4 * scores
    assert candidate_bytes(plan, plan.candidates[0], plan.sizes[0]) < scores / 4
    with pytest.raises(UnavailableError, match=r"naive at B1-S4096 needs about .* GiB, but 1\.95 GiB are free here"):
        require_memory(plan, 2_090_000_000)
    require_memory(plan, 2**40)
