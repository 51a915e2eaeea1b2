"""The formula of a whole model as a sequence of outputs."""

import tracemalloc

import numpy as np
import pytest

from diffdeploy.graphs import graph_spec
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import exact_head, exact_outputs, exact_ways, logits_of
from tests.support.models import decoder_weights, make_decoder

CONFIG = make_decoder(num_layers=8)
WEIGHTS = {name: tensor.numpy() for name, tensor in decoder_weights(CONFIG).items()}
SPEC = graph_spec("model", CONFIG, dtype="float32", max_batch_size=4, max_sequence_length=1024)
INPUTS = Case(batch_size=4, sequence_length=1, past_length=900, seed=0, mask="mixed").inputs(SPEC)


def test_outputs_are_in_the_order_of_the_layers_and_the_logits_last() -> None:
    expected = exact_outputs(CONFIG, WEIGHTS, INPUTS, SPEC)
    given = list(exact_ways(CONFIG, WEIGHTS, INPUTS, SPEC, "float32", None))
    caches = [f"present.{layer}.{side}" for layer in range(8) for side in ("key", "value")]
    assert [output.name for output in given] == [*caches, "logits"]
    for output in given:
        assert np.array_equal(output.exact, expected[output.name])
        assert output.quantised is None
    # Streams that were stored change what later layers get.
    assert np.array_equal(given[0].stored, given[0].exact)
    assert not np.array_equal(given[-2].stored, given[-2].exact)
    assert logits_of(iter(given)) is given[-1]


def test_caches_that_the_caller_drops_take_no_memory() -> None:
    size = sum(output.exact.nbytes for output in exact_ways(CONFIG, WEIGHTS, INPUTS, SPEC, "float32", None))
    tracemalloc.start()
    try:
        for _output in exact_ways(CONFIG, WEIGHTS, INPUTS, SPEC, "float32", None):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size


@pytest.mark.parametrize("at_once", [1, 7, 96, 1000])
def test_a_head_in_parts_is_the_whole_head(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_BSD = np.random.default_rng(0).standard_normal((2, 3, CONFIG.embed_dim))
    normed = x_BSD / np.sqrt(np.mean(x_BSD**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * WEIGHTS["norm.weight"]
    expected = np.einsum("bsd,vd->bsv", normed, WEIGHTS["lm_head.weight"])
    monkeypatch.setattr("diffdeploy.verify.decoder._TOKENS_AT_ONCE", at_once)
    np.testing.assert_allclose(exact_head(CONFIG, WEIGHTS, x_BSD), expected, rtol=1e-12)
