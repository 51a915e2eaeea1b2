"""Yardsticks of a model, which are computed and freed one after the other."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import WEIGHTS, eager_module, open_bundle
from diffdeploy.formats import RunOptions
from diffdeploy.modules import DiffTransformer
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import exact_outputs
from diffdeploy.verify.eager import run_arrays, run_layers
from diffdeploy.verify.feeding import start
from diffdeploy.verify.worker import ArtifactProcess
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


@pytest.mark.parametrize("last_only", [False, True])
def test_a_model_layer_by_layer_is_the_whole_model(last_only: bool, llama_pair: tuple[Path, Any]) -> None:
    bundle = open_bundle(llama_pair[0])
    model = eager_module(bundle, impl="naive")
    assert isinstance(model, DiffTransformer)
    inputs = Case(batch_size=2, sequence_length=3, past_length=5, seed=0, mask="mixed").inputs(bundle.manifest.graph)
    whole = run_arrays(model, last_only=last_only)(inputs)
    found = dict(run_layers(model, inputs, last_only=last_only))
    assert found.keys() == whole.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, whole[name])


def test_inputs_are_not_kept_while_the_artifact_computes(llama_pair: tuple[Path, Any]) -> None:
    bundle = open_bundle(llama_pair[0])
    spec, case = bundle.manifest.graph, Case(batch_size=1, sequence_length=1, past_length=9, seed=0)
    inputs = case.inputs(spec)
    kept = [weakref.ref(array) for array in inputs.values()]
    with ArtifactProcess(bundle.path, RunOptions()) as artifact:
        outputs = start(case, artifact, inputs, spec)
        del inputs
        assert all(array() is None for array in kept)
        assert outputs().keys() == spec.outputs.keys()
