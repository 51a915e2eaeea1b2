"""The fp64 formula in blocks of rows, and the eager block's error taken in stacks: the same as in one piece."""

from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.config import AnyConfig, DiffAttentionConfig
from diffdeploy.exact import lambda_value
from diffdeploy.graphs import graph_spec, run_graph
from diffdeploy.modules import block_class
from diffdeploy.verify import eager, oracle
from diffdeploy.verify.cases import Case
from tests.support.blocks import EXPORT_CONFIGS, make_config, random_weights

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


@pytest.mark.parametrize("config", EXPORT_CONFIGS.values(), ids=EXPORT_CONFIGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_of_rows_change_nothing(config: AnyConfig, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = arrays(config, case)
    whole = oracle.oracle(config, weights, inputs)
    monkeypatch.setattr(oracle, "_ROWS", 4)
    for name, array in oracle.oracle(config, weights, inputs).items():
        np.testing.assert_allclose(array, whole[name], rtol=0, atol=1e-13)


QUERIES = np.array([0, 1, 4, 7, 8])


@pytest.mark.parametrize("config", EXPORT_CONFIGS.values(), ids=EXPORT_CONFIGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chosen_queries_are_those_of_the_whole(config: AnyConfig, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = arrays(config, case)
    whole = oracle.oracle(config, weights, inputs)
    monkeypatch.setattr(oracle, "_ROWS", 2)
    chosen = oracle.oracle(config, weights, inputs, QUERIES)
    np.testing.assert_allclose(chosen.pop("output"), whole["output"][:, QUERIES], rtol=0, atol=1e-13)
    for name, array in chosen.items():
        np.testing.assert_array_equal(array, whole[name])


@pytest.mark.parametrize("config", EXPORT_CONFIGS.values(), ids=EXPORT_CONFIGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_eager_block_computes_chosen_queries(config: AnyConfig, case: Case) -> None:
    _, inputs = arrays(config, case)
    block = block_class(config).from_weights(config, random_weights(config), impl="naive", dtype=torch.float64)
    run = eager.run_arrays(block, dtype=torch.float64)
    whole = run(inputs)
    with eager.for_queries(block, QUERIES):
        chosen = run(inputs)
    np.testing.assert_allclose(chosen["output"], whole["output"][:, QUERIES], rtol=0, atol=1e-13)
    # Only within it.
    np.testing.assert_array_equal(run(inputs)["output"], whole["output"])


def test_what_is_hidden_may_hold_nan() -> None:
    config = make_config()
    weights, inputs = arrays(config, CASES["padded"])
    clean = oracle.oracle(config, weights, inputs)["output"]
    for value in (np.nan, np.inf):
        hidden, seen = (dict(inputs, hidden_states=inputs["hidden_states"].copy()) for _ in range(2))
        hidden["hidden_states"][-1, 3, 0] = value
        rest = np.arange(23) != 3
        found = oracle.oracle(config, weights, hidden)["output"]
        np.testing.assert_allclose(found[-1, rest], clean[-1, rest], rtol=0, atol=1e-13)
        seen["hidden_states"][-1, 4, 0] = value
        found = oracle.oracle(config, weights, seen)["output"]
        np.testing.assert_allclose(found[-1, :4], clean[-1, :4], rtol=0, atol=1e-13)
        assert np.isnan(found[-1, 4:]).all()


def test_products_of_float16_accumulate_in_float32() -> None:
    """As those of torch's own kernel, whose errors they stand for."""
    config, case = make_config(embed_dim=256), CASES["long"]
    weights, inputs = arrays(config, case)
    block = block_class(config).from_weights(config, random_weights(config), impl="naive", dtype=torch.float16)
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in inputs.items()}
    weights = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
    exact = oracle.oracle(config, weights, half)["output"]
    fast = eager.run_arrays(block)(half)["output"]
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in half.items()}
        own = run_graph(block, tensors)["output"].numpy()
    errors = [float(np.sqrt(np.mean((output.astype(np.float64) - exact) ** 2))) for output in (fast, own)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


@pytest.mark.parametrize("version", ["paper", "v2"])
def test_stored_streams_of_one_token(version: str) -> None:
    """With one token both streams are its value, so what storing them makes of it can be written down."""
    config = make_config(num_heads=1, num_kv_heads=1, rope=None) if version == "paper" else EXPORT_CONFIGS["v2"]
    weights, inputs = arrays(config, Case(batch_size=1, sequence_length=1, seed=0))
    inputs = {"hidden_states": inputs["hidden_states"]}
    exact, (stored, at_random) = oracle.exact_and_stored(config, weights, inputs, "float16")
    np.testing.assert_array_equal(exact["output"], oracle.oracle(config, weights, inputs)["output"])
    x = inputs["hidden_states"][0, 0].astype(np.float64)
    heads = (weights["v_proj.weight"] @ x).astype(np.float16).reshape(config.num_kv_heads, -1)
    heads = heads.repeat(config.num_heads // config.num_kv_heads, axis=0)
    if isinstance(config, DiffAttentionConfig):
        lam = np.full(1, lambda_value(config, weights))
    else:
        lam = 1 / (1 + np.exp(-weights["lambda_proj.weight"] @ x))
    second = (lam[:, None] * heads.astype(np.float64)).astype(np.float16)
    difference = (heads.astype(np.float64) - second.astype(np.float64)).astype(np.float16).astype(np.float64)
    if isinstance(config, DiffAttentionConfig):
        difference /= np.sqrt((difference**2).mean(axis=1, keepdims=True) + config.norm_eps)
        difference *= weights["subln.weight"] * config.output_scale
    np.testing.assert_allclose(stored[0, 0], weights["out_proj.weight"] @ difference.reshape(-1), rtol=0, atol=1e-14)
    assert np.abs(stored - exact["output"]).max() > 1e-5
    assert 0.3 < np.abs(at_random - exact["output"]).max() / np.abs(stored - exact["output"]).max() < 10


def test_eager_errors_are_of_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config, case = make_config(), CASES["past"]
    weights, inputs = arrays(config, case)
    expected = oracle.oracle(config, weights, inputs)
    block = block_class(config).from_weights(
        config, {name: tensor.float() for name, tensor in random_weights(config).items()}, impl="naive"
    )
    run = eager.run_arrays(block)
    stacked = eager.eager_error(run, inputs, expected, "float32")
    monkeypatch.setattr(eager, "_MAX_STACKED", 1)
    for name, single in eager.eager_error(run, inputs, expected, "float32").items():
        assert len(single._squares) == len(stacked[name]._squares) == 8
        assert single.rmse == pytest.approx(stacked[name].rmse, rel=0.05)
        assert 0 < single.rmse < 1e-5
