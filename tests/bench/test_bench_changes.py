"""A run compared with an earlier one."""

from pathlib import Path
from typing import Any

import pytest

from diffdeploy.bench import changes_since
from diffdeploy.bench.changes import require_comparable
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import InputError
from tests.support.benchmarks import make_plan, make_report


def test_noise_is_no_change_and_a_change_is_one() -> None:
    old = make_report({"naive": 10.0, "padded": 5.0, "onnx": 4.0})
    new = make_report({"naive": 20.0, "padded": 10.2, "onnx": 5.0})
    found = {(change.new.name, change.new.sequence_length): change for change in changes_since(old, new)}
    assert {key for key, change in found.items() if change.significant} == {
        *(("naive", length) for length in (128, 512)),
        *(("onnx", length) for length in (128, 512)),
    }
    assert found["onnx", 128].ratio_change == pytest.approx(-0.375)
    assert found["naive", 128].latency_change == pytest.approx(1.0)
    narrow, close = (make_report({"naive": 10.0, "onnx": latency}, spread=1e-3) for latency in (5.0, 5.2))
    assert not any(change.significant for change in changes_since(narrow, close))
    wide, far = (make_report({"naive": 10.0, "onnx": latency}, spread=0.5) for latency in (5.0, 7.0))
    assert not any(change.significant for change in changes_since(wide, far))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "cached"}, "the graph was cached, but is plain now"),
        ({"dtype": "float16"}, "the dtype was float16, but is float32 now"),
        ({"baseline": "padded"}, "the baseline was padded, but is naive now"),
        ({"results": []}, "no candidate and size in common"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_of_different_things_are_not_compared(
    changes: dict[str, Any], message: str, block: Checkpoint, tmp_path: Path
) -> None:
    old = make_report({"naive": 1.0})
    plan = make_plan(block, tmp_path, old.sizes[0]).model_copy(update={"threads": 2})
    require_comparable(old, plan, old.block.model_copy(update={"source": "elsewhere"}))
    with pytest.raises(InputError, match=message):
        require_comparable(old.model_copy(update=changes), plan, old.block)
    with pytest.raises(InputError, match="the block was"):
        require_comparable(old, plan, old.block.model_copy(update={"num_heads": 4}))
