"""Every fault is put into a right bundle and must be caught, and its stage named; every check must be able to fail."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffdeploy.bundle import WEIGHTS, Environment, ExportRecord, Manifest, Provenance
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig
from diffdeploy.errors import ExportError, InputError, VerificationError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.files import file_sha256
from diffdeploy.formats import distributions
from diffdeploy.formats.expected import expected_constants
from diffdeploy.graphs import Variant, graph_spec
from diffdeploy.selftest import Fault, FaultTarget, SelfTest, Skipped, Trials, all_faults, self_test
from tests.support.blocks import make_config, random_weights

FORMATS = ("onnx", "pt2", "aoti")
CONFIG = make_config(embed_dim=48)  # as wide as the joined heads, which outputs then give away
BY_NAME = {fault.name: fault for fault in all_faults()}

# What `make test` leaves to `make slow`: an export takes seconds, and loading a program half of one.
_ONNX_BLOCKS = {"causal_top_left", "mask_ignored_by_noise", "hidden_rows_are_averages", "cached_before_rope"}
_PT2_BLOCKS = {
    *("query_streams_exchanged", "modulo_values", "value_halves_exchanged", "half_precision_attention"),
    *("cache_not_appended", "rope_of_the_other_style", "norm_over_halves", "mask_ignored_by_signal", "noisy"),
}
QUICK_BLOCKS = {"onnx": _ONNX_BLOCKS, "pt2": _ONNX_BLOCKS | _PT2_BLOCKS, "aoti": set[str]()}
QUICK_CONSTANTS_OF_PT2 = {"query_streams_swapped", "v_weight_off_by_one_bit", "lambda_negated", "norm_eps_large"}

# Faults whose stage is not named, and why.
NOT_LOCATED = {
    "norm_before_difference": "the noise that lambda is multiplied with is the first value that is not there",
    "keys_turned_twice": "keys turned once, as they should be, are among the values",
    "noise_not_turned": "all keys turned, as they should be, are among the values",
}


def checkpoint(config: DiffAttentionConfig = CONFIG) -> Checkpoint:
    weights = {name: tensor.float() for name, tensor in random_weights(config).items()}
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


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


def trials_of_every_format() -> Iterator[object]:
    for name in FORMATS:
        bundle = subject(name)
        for fault in all_faults():
            if fault.applies(bundle):
                late = fault.place == "block" and fault.name not in QUICK_BLOCKS[name]
                late |= name == "pt2" and fault.place == "constants" and fault.name not in QUICK_CONSTANTS_OF_PT2
                marks = [pytest.mark.slow] if late else []
                yield pytest.param(name, fault, id=f"{name}-{fault.name}", marks=marks)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By format, a bundle that is exported when it is first asked for."""
    folder = tmp_path_factory.mktemp("faults")

    def bundle(format_name: str) -> Path:
        path = folder / format_name
        if not path.exists():
            export_bundle(checkpoint(), path, options(format_name), verify=False)
        return path

    return bundle


@pytest.fixture(scope="module")
def trials(bundles: Callable[[str], Path]) -> Callable[[str], Trials]:
    made: dict[str, Trials] = {}

    def of_format(format_name: str) -> Trials:
        if format_name not in made:
            made[format_name] = Trials(bundles(format_name))
        return made[format_name]

    return of_format


@pytest.mark.parametrize(("format_name", "fault"), list(trials_of_every_format()))
def test_every_fault_is_caught_and_located(
    format_name: str, fault: Fault, trials: Callable[[str], Trials], bundles: Callable[[str], Path]
) -> None:
    prepared = trials(format_name)
    assert fault in prepared.faults
    before = {file.name: file_sha256(file) for file in bundles(format_name).iterdir()}
    result = prepared.run(fault)
    assert result.caught
    if result.located is False:
        assert fault.name in NOT_LOCATED, f"{result.stage} was named, not {fault.stage}"
    assert before == {file.name: file_sha256(file) for file in bundles(format_name).iterdir()}


@pytest.mark.parametrize(("graph", "width"), [("plain", 16), ("plain", 8), ("masked", 8)])
def test_stages_are_located_where_each_stream_is_computed_by_itself(graph: Variant, width: int, tmp_path: Path) -> None:
    """`GroupQueryAttention` takes each stream alone, and may turn queries and keys inside."""
    ort = ExportOptions(onnx_flavor="ort", graph=graph, max_batch_size=4, max_sequence_length=70)
    with pytest.raises(InputError, match="multiples of 8, and the values of this block have 12"):
        export_bundle(checkpoint(), tmp_path / "bundle", ort, verify=False)
    wider = make_config(embed_dim=8 * width, head_dim=width)
    export_bundle(checkpoint(wider), tmp_path / "bundle", ort, verify=False)
    trials = Trials(tmp_path / "bundle")
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


def test_there_are_enough_faults() -> None:
    assert len(BY_NAME) == len(all_faults()) >= 80
    for name in FORMATS:
        assert sum(fault.applies(subject(name)) for fault in all_faults()) >= 100
    assert Counter(fault.place for fault in all_faults()).keys() == {"constants", "block", "graph", "bundle", "runtime"}


def test_most_faults_with_a_stage_are_located() -> None:
    with_stage = [fault for fault in all_faults() if fault.stage is not None]
    assert len(NOT_LOCATED.keys() & {fault.name for fault in with_stage}) <= 0.05 * len(with_stage)


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
        ("run_random_last_bits", {"determinism", "batch invariance", "causality", "padding invariance"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_check_that_fails_is_the_one_that_is_broken(
    name: str, checks: set[str], trials: Callable[[str], Trials]
) -> None:
    by = trials("onnx").run(BY_NAME[name]).by
    assert {entry.removeprefix("check ") for entry in by if entry.startswith("check ")} == checks


def test_a_fault_that_nothing_sees_fails_the_self_test(trials: Callable[[str], Trials]) -> None:
    harmless = Fault(name="harmless", place="runtime", breaks="nothing", wrap=lambda run: run)
    result = trials("onnx").run(harmless)
    assert not result.caught
    summary = SelfTest.of([result], [])
    assert (summary.injected, summary.caught, summary.passed) == (1, 0, False)
    assert not SelfTest.of([], [Skipped(name="other", reason="no compiler")]).passed


def test_a_mutator_that_changes_nothing_is_an_error(trials: Callable[[str], Trials]) -> None:
    idle = Fault(name="idle", place="bundle", breaks="nothing", inject=lambda subject: None)
    with pytest.raises(ExportError, match="the fault idle does not change the artifact"):
        trials("onnx").run(idle)


def test_a_bundle_that_fails_by_itself_proves_nothing(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(bundles("onnx"), copy)
    faulty = FaultTarget(
        copy,
        Manifest.from_bytes((copy / "manifest.json").read_bytes()),
        expected_constants(subject("onnx").manifest, load_file(copy / WEIGHTS)),
        load_file(copy / WEIGHTS),
    )
    BY_NAME["lambda_negated"].inject(faulty)
    from diffdeploy.bundle import write_manifest

    write_manifest(copy, faulty.manifest)
    with pytest.raises(VerificationError, match="fails verification without any fault put in"):
        self_test(copy)


def test_constants_are_found_in_every_format(trials: Callable[[str], Trials]) -> None:
    for name in FORMATS:
        places = Counter(fault.place for fault in trials(name).faults)
        assert places["constants"] >= 50
        assert places["runtime"] >= 15


def test_bits_are_moved_by_one() -> None:
    from diffdeploy.selftest.constant_fault import next_bit

    array = np.array([1.0, -4.0, 0.5], np.float32)
    assert next_bit(array).tolist() == [1.0, float(np.nextafter(np.float32(-4.0), np.float32(0))), 0.5]
