"""What the operator refuses: masks, shapes and devices that do not fit."""

from typing import Any

import pytest
import torch

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops import diff_attention
from tests.support.operator_inputs import random_inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "accepted: shapes that broadcast to"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "accepted: boolean"),
        ({"attn_mask": torch.ones(1, 1, 1, 5, 5, dtype=torch.bool)}, "at most 4 axes"),
        ({"sliding_window": 2, "causal": False}, "requires causal attention"),
        ({"impl": "flash2"}, "flash2 runs on CUDA only, but the tensors are on cpu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], message: str) -> None:
    q, k, v = random_inputs(4, 2, 5, 5)
    with pytest.raises(DiffDeployError, match=message) as refused:
        diff_attention(q, k, v, torch.tensor(0.4), **{"causal": True, **changes})
    assert isinstance(refused.value, UnavailableError if "impl" in changes else InputError)


@pytest.mark.parametrize(("side", "kept"), [(0, 3), (0, 6), (1, 3), (2, 1)], ids=str)
def test_shapes_that_do_not_fit_are_refused(side: int, kept: int) -> None:
    inputs = list(random_inputs(4, 2, 5, 5))
    inputs[side] = inputs[side][:, :kept]
    with pytest.raises(InputError, match="do not fit"):
        diff_attention(inputs[0], inputs[1], inputs[2], torch.tensor(0.4), causal=True)


@pytest.mark.parametrize("impl", ["four_call", "stacked_split"])
def test_odd_values_cannot_be_halved(impl: str) -> None:
    q, k, v = random_inputs(4, 2, 5, 5, shared_keys=True)
    with pytest.raises(InputError, match="their width 3 is odd"):
        diff_attention(q, k, v[..., :3], torch.tensor(0.4), causal=True, impl=impl)
