"""Every fault is put into a right bundle and must be caught, and its stage named; every check must be able to fail."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffdeploy.bundle import WEIGHTS, Environment, ExportRecord, Manifest, Provenance, write_manifest
from diffdeploy.errors import ExportError, InputError, VerificationError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.files import file_sha256
from diffdeploy.formats import distributions
from diffdeploy.formats.expected import expected_constants
from diffdeploy.graphs import Stage, Variant, graph_spec
from diffdeploy.selftest import Fault, FaultResult, FaultTarget, SelfTest, Skipped, Trials, all_faults, self_test
from tests.support.blocks import checkpoint_of, make_config, random_weights
from tests.support.bundles import BundleCache
from tests.support.pairwise import rest_is_slow

FORMATS = ("onnx", "pt2", "aoti")
CONFIG = make_config(embed_dim=48)  # as wide as the joined heads, which outputs then give away
BY_NAME = {fault.name: fault for fault in all_faults()}

# Faults of the whole that the same check, or cases of the same kind, see. The first stands for all in `make test`.
SEEN_ALIKE = (
    ("onnx_batch_axis_fixed", "onnx_output_renamed"),
    ("onnx_foldable_node", "onnx_batch_frozen_inside", "onnx_unused_constant"),
    ("onnx_path_in_a_node_name", "onnx_path_in_a_doc_string"),
    ("onnx_another_domain", "onnx_another_opset"),
    ("pt2_operands_exchanged", "pt2_output_scaled"),
    ("byte_changed", "weights_missing", "file_left_over", "weights_are_a_link"),
    ("weights_file_off_by_one_bit", "weights_file_of_another_block"),
    ("run_nan_at_length_one", "run_random_noise", "run_half_precision", "run_another_dtype", "run_lost_batch_axis",
     "run_fails_at_length_one"),
    ("run_rows_leak", "run_first_row_for_all", "run_future_leaks", "run_cache_shifted"),
    ("run_padding_leaks", "run_earlier_result"),
    ("noisy", "nan_at_length_one", "batch_average"),
)  # fmt: skip
# A fault in a block that only some inputs show, which is more than its stage says.
SHOWN_BY_FEW_INPUTS = "mask_ignored_by_noise"

# Faults whose stage is not named, and why.
NOT_LOCATED = {
    "norm_before_difference": "the noise that lambda is multiplied with is the first value that is not there",
    "keys_turned_twice": "keys turned once, as they should be, are among the values",
    "noise_not_turned": "all keys turned, as they should be, are among the values",
    "queries_clamped_at_50": "where only queries of the noise are larger, its attention is the first that is off",
    "hidden_by_ten_thousand": "where only scores of the noise differ so much, its attention is the first that is off",
}

# What probes name in their place, since a package of machine code shows nothing but its outputs.
NEIGHBOURS = {
    # The same outputs come from another lambda, from a norm with negative factors, or from another matrix behind it.
    "noise_is_added": Stage.LAMBDA,
    "mixed_by_lambda": Stage.LAMBDA,
    "difference_reversed": Stage.NORM,
    "value_halves_exchanged": Stage.OUTPUT_PROJECTION,
    # New keys of zeros are what a projection of zeros gives.
    "cache_not_appended": Stage.K_PROJECTION,
    # Rounding is as far off in one stage as in the next.
    "half_precision_attention": Stage.NORM,
    "half_precision_noise": Stage.NORM,
    "half_precision_projection": Stage.SIGNAL,
    # Probes are few and short, without padding, and vary the queries of both streams together.
    "one_query_stream": Stage.SIGNAL,
    "noise_reads_one_half": Stage.SIGNAL,
    "mask_ignored_by_noise": Stage.SIGNAL,
    "mask_inverted": Stage.DIFFERENCE,
    "rope_wrong_at_the_last_position": Stage.SIGNAL,
    "negative_part_lost": Stage.SIGNAL,
    "layer_norm": Stage.SIGNAL,
}

Results = Callable[[str, Fault], FaultResult]


def in_group(format_name: str) -> pytest.MarkDecorator:
    """For tests that look at one bundle, and share what was computed for it."""
    return pytest.mark.xdist_group(f"faults of {format_name}")


def options(format_name: str) -> ExportOptions:
    return ExportOptions(format=format_name, graph="cached", max_batch_size=4, max_sequence_length=70)


def subject(format_name: str) -> FaultTarget:
    """A bundle of that format as far as faults ask for it, without exporting it."""
    spec = graph_spec("cached", CONFIG, dtype="float32", max_batch_size=4, max_sequence_length=70)
    weights = {name: tensor.float().numpy() for name, tensor in random_weights(CONFIG).items()}
    manifest = Manifest(
        format=format_name,
        config=CONFIG,
        graph=spec,
        options=ExportRecord(attention_impl="two_call", seed=0),
        verified=False,
        environment=Environment.current(distributions()),
        provenance=Provenance(files={}, layout="none", layer=None, keys=[], options={}),
        files={},
    )
    return FaultTarget(Path(), manifest, expected_constants(manifest, weights), weights)


def class_of(fault: Fault, format_name: str) -> tuple[str, str]:
    """Place and stage; for a fault of the whole, the place and what sees it. One of each class is in `make test`."""
    if format_name != "onnx" and fault.place in ("block", "constants"):  # the stage is found by the same steps
        return fault.place, ""
    if fault.stage is not None:
        return fault.place, str(fault.stage)
    if fault.family != fault.place and format_name == "onnx":
        return fault.place, fault.family
    if fault.place == "runtime" and format_name != "onnx":  # stands outside the runtime, so the format changes nothing
        return fault.place, ""
    return fault.place, next((names[0] for names in SEEN_ALIKE if fault.name in names), fault.name)


def trials_of_every_format() -> Iterator[object]:
    for name in FORMATS:
        bundle, seen = subject(name), set[tuple[str, str]]()
        for fault in all_faults():
            if fault.applies(bundle):
                kind = class_of(fault, name)
                quick = kind not in seen or (name == "onnx" and fault.name == SHOWN_BY_FEW_INPUTS)
                quick &= name != "aoti"  # the bundle is compiled, and so is each block
                seen.add(kind)
                yield pytest.param(
                    name,
                    fault,
                    id=f"{name}-{fault.name}",
                    marks=[in_group(name), *([] if quick else [pytest.mark.slow])],
                )


@pytest.fixture(scope="module")
def bundle_of(bundles: BundleCache) -> Callable[[str], Path]:
    return lambda format_name: bundles.bundle(checkpoint_of(CONFIG), options(format_name), verify=False)


@pytest.fixture(scope="module")
def trials(bundle_of: Callable[[str], Path]) -> Callable[[str], Trials]:
    return cache(lambda format_name: Trials(bundle_of(format_name)))


@pytest.fixture(scope="module")
def result(trials: Callable[[str], Trials]) -> Results:
    """How a fault fared in a bundle of a format; each is tried once."""
    return cache(lambda format_name, fault: trials(format_name).run(fault))


@pytest.mark.parametrize(("format_name", "fault"), list(trials_of_every_format()))
def test_every_fault_is_caught_and_located(
    format_name: str, fault: Fault, trials: Callable[[str], Trials], result: Results, bundle_of: Callable[[str], Path]
) -> None:
    prepared = trials(format_name)
    assert fault.name in {*(known.name for known in prepared.faults), *(known.name for known in prepared.skipped)}
    before = {file.name: file_sha256(file) for file in bundle_of(format_name).iterdir()}
    found = result(format_name, fault)
    assert found.caught or not fault.provable
    if found.located is False:
        known = NEIGHBOURS.get(fault.name) if format_name == "aoti" else None
        assert fault.name in NOT_LOCATED or found.stage == known, f"{found.stage} was named, not {fault.stage}"
    assert before == {file.name: file_sha256(file) for file in bundle_of(format_name).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "width"), rest_is_slow([("masked", 8), ("plain", 16), ("plain", 8), ("masked", 16)]))
def test_stages_are_located_where_each_stream_is_computed_by_itself(
    graph: Variant, width: int, bundles: BundleCache, tmp_path: Path
) -> None:
    """`GroupQueryAttention` takes each stream alone, and may turn queries and keys inside."""
    ort = ExportOptions(onnx_flavor="ort", graph=graph, max_batch_size=4, max_sequence_length=70)
    with pytest.raises(InputError, match="multiples of 8, but the values of this block have 12"):
        export_bundle(checkpoint_of(CONFIG), tmp_path / "bundle", ort, verify=False)
    wider = make_config(embed_dim=8 * width, head_dim=width)
    trials = Trials(bundles.bundle(checkpoint_of(wider), ort, verify=False))
    names = [
        "softmax_scale_missing",
        "norm_eps_large",
        "output_factor_missing",
        "output_weight_transposed",
        "other_key_map",
    ]
    names += ["rope_of_the_other_style"] if width == 8 else []
    results = {fault.name: trials.run(fault) for fault in trials.faults if fault.name in names}
    assert len(results) >= 4
    assert {name: result.stage for name, result in results.items()} == {name: BY_NAME[name].stage for name in results}


LEGAL = ["masks", "positions", "batches", "lengths", "values"]


@pytest.fixture(scope="module")
def wide_trials(bundles: BundleCache) -> Trials:
    """Of a bundle with more rows and longer sequences than those that are tried one by one."""
    wide = ExportOptions(graph="cached", max_batch_size=12, max_sequence_length=600)
    return Trials(bundles.bundle(checkpoint_of(CONFIG), wide, verify=False))


@in_group("onnx")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(fault.name, marks=[] if fault.name == "lengths_above_129_off" else [pytest.mark.slow])
        for fault in all_faults()
        if fault.family in LEGAL
    ],
)
def test_faults_of_legal_inputs_are_caught_in_wide_ranges(name: str, wide_trials: Trials) -> None:
    assert name in {fault.name for fault in wide_trials.faults}
    assert wide_trials.run(BY_NAME[name]).caught


def test_faults_are_counted_by_family() -> None:
    def fared(name: str, family: str, *, caught: bool, provable: bool = True) -> FaultResult:
        fault = Fault(name=name, place="runtime", breaks="it", family=family, provable=provable)
        return FaultResult.refused(fault, "").model_copy(update={"caught": caught})

    results = [
        fared("a", "masks", caught=True),
        fared("b", "masks", caught=True),
        fared("c", "", caught=True),
        fared("d", "exact values", caught=False, provable=False),
    ]
    test = SelfTest.of(results, [])
    assert [(f.name, f.caught, f.injected, f.provable) for f in test.families] == [
        ("masks", 2, 2, True),
        ("runtime", 1, 1, True),
        ("exact values", 0, 1, False),
    ]
    assert (test.injected, test.caught, test.passed) == (3, 3, True)
    assert not SelfTest.of([*results, fared("e", "masks", caught=False)], []).passed


def test_there_are_enough_faults() -> None:
    assert len(BY_NAME) == len(all_faults()) >= 80
    for name in FORMATS:
        assert sum(fault.applies(subject(name)) for fault in all_faults()) >= 130
    assert sum(fault.family in LEGAL for fault in all_faults()) >= 50
    assert Counter(fault.place for fault in all_faults()).keys() == {"constants", "block", "graph", "bundle", "runtime"}


def test_most_faults_with_a_stage_are_located() -> None:
    with_stage = [fault for fault in all_faults() if fault.stage is not None]
    assert len(NOT_LOCATED.keys() & {fault.name for fault in with_stage}) <= 0.05 * len(with_stage)


@in_group("onnx")
@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("onnx_batch_axis_fixed", {"interface"}),
        ("onnx_batch_frozen_inside", {"folded"}),
        ("onnx_third_softmax", {"attention"}),
        ("onnx_foldable_node", {"folded"}),
        ("onnx_unused_constant", {"folded"}),
        ("onnx_path_in_a_doc_string", {"traces"}),
        ("onnx_path_in_a_node_name", {"traces"}),
        ("onnx_another_opset", {"operators"}),
        ("onnx_another_domain", {"operators"}),
        ("onnx_output_renamed", {"interface"}),
        ("onnx_does_not_load", {"valid", "loads"}),
        ("artifact_truncated", {"readable", "loads"}),
        ("rope_wrong_at_the_last_position", {"rope"}),
        ("gamma_off_by_one_bit", {"weights"}),
        ("lambda_rounded_to_bfloat16", {"lambda"}),
        ("golden_output_off_by_a_millionth", {"golden"}),
        ("run_random_last_bits", {"determinism", "batch invariance", "NaN", "causality", "padding invariance"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_check_that_fails_is_the_one_that_is_broken(name: str, checks: set[str], result: Results) -> None:
    by = result("onnx", BY_NAME[name]).by
    assert {entry.removeprefix("check ") for entry in by if entry.startswith("check ")} == checks


@in_group("onnx")
def test_a_fault_that_nothing_sees_fails_the_self_test(trials: Callable[[str], Trials]) -> None:
    harmless = Fault(name="harmless", place="runtime", breaks="nothing", wrap=lambda run: run)
    result = trials("onnx").run(harmless)
    assert not result.caught
    summary = SelfTest.of([result], [])
    assert (summary.injected, summary.caught, summary.passed) == (1, 0, False)
    assert not SelfTest.of([], [Skipped(name="other", reason="no compiler")]).passed


@in_group("onnx")
def test_a_mutator_that_changes_nothing_is_an_error(trials: Callable[[str], Trials]) -> None:
    idle = Fault(name="idle", place="bundle", breaks="nothing", inject=lambda subject: None)
    with pytest.raises(ExportError, match="the fault idle does not change the artifact"):
        trials("onnx").run(idle)


@in_group("onnx")
def test_a_bundle_that_fails_by_itself_proves_nothing(bundle_of: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_of("onnx"), copy)
    faulty = FaultTarget(
        copy,
        Manifest.from_bytes((copy / "manifest.json").read_bytes()),
        expected_constants(subject("onnx").manifest, load_file(copy / WEIGHTS)),
        load_file(copy / WEIGHTS),
    )
    BY_NAME["lambda_negated"].inject(faulty)
    write_manifest(copy, faulty.manifest)
    with pytest.raises(VerificationError, match="fails verification without any fault"):
        self_test(copy)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[in_group(name), *[pytest.mark.slow] * (name == "aoti")]) for name in FORMATS],
)
def test_constants_are_found_in_every_format(name: str, trials: Callable[[str], Trials]) -> None:
    places = Counter(fault.place for fault in trials(name).faults)
    assert places["constants"] >= 50
    assert places["runtime"] >= 15


def test_bits_are_moved_by_one() -> None:
    from diffdeploy.selftest.constant_fault import next_bit

    array = np.array([1.0, -4.0, 0.5], np.float32)
    assert next_bit(array).tolist() == [1.0, float(np.nextafter(np.float32(-4.0), np.float32(0))), 0.5]
