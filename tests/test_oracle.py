"""The fp64 formula in blocks of rows, and the eager block's error taken in stacks: the same as in one piece."""

from typing import Any

import numpy as np
import pytest

from diffdeploy.config import AnyConfig
from diffdeploy.graphs import graph_spec
from diffdeploy.modules import block_class
from diffdeploy.verify import eager, oracle
from diffdeploy.verify.cases import Case
from tests.test_attention import make_config, random_weights
from tests.test_variants import CONFIGS

CASES = {
    "long": Case(batch_size=2, sequence_length=23, seed=0),
    "padded": Case(batch_size=2, sequence_length=23, seed=0, mask="ragged"),
    "past": Case(batch_size=2, sequence_length=11, past_length=12, seed=0, mask="left"),
    "hidden": Case(batch_size=2, sequence_length=9, seed=0, mask="hidden"),
}


def arrays(config: AnyConfig, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = graph_spec("cached", config, dtype="float32", max_batch_size=4, max_sequence_length=30)
    weights = {name: tensor.numpy() for name, tensor in random_weights(config).items()}
    return weights, case.inputs(spec)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_of_rows_change_nothing(config: AnyConfig, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = arrays(config, case)
    whole = oracle.oracle(config, weights, inputs)
    monkeypatch.setattr(oracle, "_ROWS", 4)
    for name, array in oracle.oracle(config, weights, inputs).items():
        np.testing.assert_allclose(array, whole[name], rtol=0, atol=1e-13)


def test_eager_errors_are_of_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config, case = make_config(), CASES["past"]
    weights, inputs = arrays(config, case)
    expected = oracle.oracle(config, weights, inputs)
    block = block_class(config).from_weights(
        config, {name: tensor.float() for name, tensor in random_weights(config).items()}, impl="naive"
    )
    stacked = eager.eager_error(block, inputs, expected, "float32")
    monkeypatch.setattr(eager, "_MAX_STACKED", 1)
    for name, single in eager.eager_error(block, inputs, expected, "float32").items():
        assert len(single._squares) == len(stacked[name]._squares) == 8
        assert single.rmse == pytest.approx(stacked[name].rmse, rel=0.05)
        assert 0 < single.rmse < 1e-5
