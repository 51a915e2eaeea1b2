"""What a config of a block accepts."""

from typing import Any

import pytest

from diffdeploy.errors import InputError
from tests.support.blocks import make_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads is 3.*divisor of num_heads"),
        ({"head_dim": 5}, "head_dim is 5.*even"),
        ({"num_heads": 0}, "num_heads is 0.*positive"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0.*positive"),
        ({"lambda_init": float("nan")}, "lambda_init is nan.*finite"),
        ({"gqa_layout": "other"}, "gqa_layout is 'other'.*canonical or legacy"),
    ],
)
def test_illegal_configs_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(**changes)
