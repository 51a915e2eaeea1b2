"""The block that the benchmark's parts are tried on."""

import pytest

from diffdeploy.bench import random_checkpoint
from diffdeploy.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def block() -> Checkpoint:
    return random_checkpoint(embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=6)
