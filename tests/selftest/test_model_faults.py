"""Faults of whole models are caught, and where they are in one layer, that layer is named."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from diffdeploy.bundle import open_bundle
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.selftest import FaultResult, Trials
from diffdeploy.selftest.local_artifact import LocalArtifact
from diffdeploy.selftest.models import model_faults
from diffdeploy.selftest.stand_in import StandIn
from diffdeploy.verify import verify_bundle
from tests.support.bundles import SMALL_MODEL, BundleCache
from tests.support.models import make_decoder

OPTIONS = {
    "standard": SMALL_MODEL,
    "ort": replace(SMALL_MODEL, onnx_flavor="ort"),
    "program": replace(SMALL_MODEL, format="pt2"),
}
# One of each kind; the others are slow together. Of a fault in one layer, the number of that layer in the sample.
QUICK = {
    "standard": (
        "query_streams_swapped", "v_weight_off_by_one_bit", "layers_swapped", "lambdas_swapped", "final_norm_missing",
        "cache_position_off_by_one", "cache_layers_swapped", "cache_wraps_at_the_capacity", "generates_the_wrong_row",
    ),
    "ort": ("cache_left_padding_counted", "cache_written_beyond"),
    "program": ("output_factor_missing", "lambdas_swapped"),
}  # fmt: skip


@pytest.fixture(scope="module")
def path_of(bundles: BundleCache) -> Callable[[str], Path]:
    return lambda kind: bundles.bundle(read_model(SAMPLE), OPTIONS[kind])


@pytest.fixture(scope="module")
def trials_of(path_of: Callable[[str], Path]) -> Callable[[str], Trials]:
    return cache(lambda kind: Trials(path_of(kind)))


def _run(trials: Trials, name: str) -> FaultResult:
    return trials.run(next(fault for fault in trials.faults if fault.name == name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        # Programs are looked into one layer at a time, which takes half a minute.
        pytest.param(kind, name, marks=[pytest.mark.slow] if kind == "program" else [])
        for kind, names in QUICK.items()
        for name in names
    ],
)
def test_faults_are_caught_and_their_layer_is_named(kind: str, name: str, trials_of: Callable[[str], Trials]) -> None:
    found = _run(trials_of(kind), name)
    assert found.caught
    assert found.located is not False, f"{found.stage} was named, not {found.expected_stage}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", OPTIONS)
def test_all_faults(kind: str, trials_of: Callable[[str], Trials]) -> None:
    trials = trials_of(kind)
    results = [trials.run(fault) for fault in trials.faults]
    assert [result.name for result in results if not result.caught] == []
    wrong = {result.name: result.stage for result in results if result.located is False}
    assert wrong == {}


def test_a_bundle_of_a_model_has_faults_of_every_kind(trials_of: Callable[[str], Trials]) -> None:
    trials = trials_of("standard")
    assert trials.skipped == []
    families = Counter(fault.family for fault in trials.faults)
    assert families["constants of models"] >= 60
    assert families["caches"] >= 9
    assert families["generation"] >= 6
    assert families["model"] >= 10
    assert families["bundle"] >= 8
    layers = {fault.stage for fault in trials.faults if fault.stage}
    assert layers == {"layer 0", "layer 1", "layer 2", "layer 3", "head"}


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_faults_fit_models_of_any_depth(num_layers: int) -> None:
    faults = model_faults(make_decoder(num_layers=num_layers))
    names = [fault.name for fault in faults]
    assert len(set(names)) == len(names)
    named = {fault.stage for fault in faults} - {None, "head"}
    assert named == {f"layer {number}" for number in range(num_layers)}


@pytest.mark.parametrize("kind", ["standard", "ort"])
def test_what_stands_in_for_a_runtime_computes_the_same(kind: str, path_of: Callable[[str], Path]) -> None:
    """Without a wrong step there is no fault, or each would be caught for another reason."""
    report = verify_bundle(path_of(kind), cases="quick", open_artifact=partial(LocalArtifact, stand_in=StandIn))
    assert report.passed
    (check,) = (check for check in report.contract if check.name == "capacity")
    assert check.detail == "more than 48 tokens are refused (3 ways)"


def test_the_bundle_is_not_touched(trials_of: Callable[[str], Trials], path_of: Callable[[str], Path]) -> None:
    before = open_bundle(path_of("standard")).manifest.files
    _run(trials_of("standard"), "ffn_weight_scaled")
    assert open_bundle(path_of("standard")).manifest.files == before
