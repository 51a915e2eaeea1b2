"""Yardsticks of a model, which the verification takes one after the other."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, open_bundle
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.yardsticks import Yardsticks


def test_a_yardstick_that_the_caller_drops_is_freed_before_the_next(llama_pair: tuple[Path, Any]) -> None:
    bundle = open_bundle(llama_pair[0])
    config, spec = bundle.manifest.config, bundle.manifest.graph
    weights = read_safetensors(bundle.path / WEIGHTS)
    case = Case(batch_size=2, sequence_length=3, past_length=5, seed=0, mask="mixed")
    inputs = case.inputs(spec)
    expected = exact_outputs(config, weights, inputs, spec)

    previous: weakref.ref[Array] | None = None
    names = []
    for name, held in Yardsticks(bundle, weights).of(case, inputs):
        if previous is not None:
            assert previous() is None
        (part,) = held
        assert list(part.rows) == [0, 1]
        np.testing.assert_array_equal(part.yardstick.expected, expected[name])
        assert part.yardstick.rmse < 1e-5
        names.append(name)
        previous = weakref.ref(part.yardstick.expected)
        del held, part
    assert sorted(names) == sorted(spec.outputs)
