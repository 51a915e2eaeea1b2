"""Models with activations in int8: verified exactly, product by product and without the rounding, and as a whole."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffdeploy.bundle import open_bundle, write_manifest
from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import main
from diffdeploy.errors import InputError
from diffdeploy.exporters import export_bundle
from diffdeploy.verify import Report, verify_bundle, verify_golden
from diffdeploy.verify.checkpoint_match import matches_checkpoint
from diffdeploy.verify.differences import differences, read_described
from diffdeploy.verify.products import check_products
from diffdeploy.verify.report import read_report
from tests.exporters.test_ort_models import KINDS, SMALL
from tests.exporters.test_quantised_models import (
    EVERY_KIND,
    INT4,
    changed,
    constant,
    export_of,
    products,
    swap_matrices,
    swap_scales,
    use_twice,
)
from tests.support.bundles import BundleCache
from tests.support.pairwise import rest_is_slow

TWIN = "-float32-activations"


@pytest.fixture(scope="module", params=rest_is_slow(["int4", "int8"]))
def sample(request: pytest.FixtureRequest, bundles: BundleCache) -> Path:
    """The sample, verified with a quick sweep. Shared: copy before changing."""
    return bundles.bundle(read_model(SAMPLE), replace(SMALL, weights=request.param, activations="int8"))


@pytest.fixture(scope="module")
def int4(bundles: BundleCache) -> Path:
    return bundles.bundle(read_model(SAMPLE), replace(INT4, activations="int8"))


def check_of(report: Report, name: str) -> Any:
    (check,) = (check for check in report.contract if check.name == name)
    return check


def test_the_sample_passes_with_and_without_the_rounding(sample: Path) -> None:
    how = open_bundle(sample).manifest.options.quantisation
    assert how is not None
    assert (how.accuracy_level, how.activations, how.activation_blocks) == (4, "int8", 32)
    for node in products(onnx.load(sample / "model.onnx")):
        (level,) = (each.i for each in node.attribute if each.name == "accuracy_level")
        assert level == 4
    report = read_report(sample / "verification.json")
    assert report.passed
    assert check_of(report, "activations").detail.startswith("the inputs of 28 products are rounded to int8")
    assert check_of(report, "greedy tokens, float32 activations").passed
    twins = {case.id.removesuffix(TWIN): case for case in report.cases if case.id.endswith(TWIN)}
    others = {case.id: case for case in report.cases if not case.id.endswith(TWIN)}
    assert twins.keys() == others.keys()
    assert {"layer0", "layer3", "head", "B1-S33-normal"} <= twins.keys()
    # Without the rounding there is no allowance for it, and the head is not quantised.
    assert all(output.activation_rmse == 0 for case in twins.values() for output in case.outputs)
    allowed = [output.activation_rmse for name, case in others.items() if name != "head" for output in case.outputs]
    # Keys and values of the past are copied.
    assert sum(share > 0 for share in allowed) > 0.9 * len(allowed)
    assert report.loss is not None
    assert report.loss.agreement > (0.98 if how.bits == 8 else 0.9)
    assert matches_checkpoint(sample, SAMPLE).passed
    assert verify_golden(sample).passed


@pytest.mark.parametrize(
    ("kind", "options"), rest_is_slow([*EVERY_KIND, ("window", {"weights": "int8", "block_size": 64})])
)
def test_models_of_every_kind(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    done = export_of(KINDS[kind], tmp_path / "bundle", activations="int8", **options)
    assert done.report is not None
    assert done.report.passed
    assert check_of(done.report, "activations").passed


def test_without_it_nothing_is_said_of_activations(bundles: BundleCache, int4: Path) -> None:
    floats = bundles.bundle(read_model(SAMPLE), INT4)
    report = read_report(floats / "verification.json")
    assert not any("activations" in check.name for check in report.contract)
    assert not any(case.id.endswith(TWIN) for case in report.cases)
    found = {(each.section, each.name): each for each in differences(read_described(floats), read_described(int4))}
    level = found["options", "quantisation.accuracy_level"]
    assert (level.before, level.after) == (0, 4)
    # The weights are the same; the exact outputs are not.
    assert ("files", "weights.safetensors") not in found
    assert ("files", "golden.safetensors") in found


def change_constant(index: int, change: Callable[[Any], Any]) -> Callable[[onnx.ModelProto], None]:
    """Change blocks (1) or scales (2) of the product of a layer's outputs of attention."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = constant(model, products(model)[3].input[index])
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(change(array.copy())), tensor.name))

    return apply


def one_scale(scales: Any) -> Any:
    scales[2, 1] *= 1.1
    return scales


def one_number(blocks: Any) -> Any:
    blocks[2, 1, 3] ^= 1
    return blocks


def keep_one(model: onnx.ModelProto) -> None:
    node = products(model)[3]
    kept = [each for each in node.attribute if each.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend(kept)


def zero_points_off_by_one(model: onnx.ModelProto) -> None:
    node = products(model)[3]
    rows, num_blocks = constant(model, node.input[2]).dims
    zeros = np.full((rows, (num_blocks + 1) // 2), 0x77, np.uint8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, "zero_points"))
    node.input.append("zero_points")


# Whether the comparison without the rounding sees it, and whether that of single products does.
FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], bool, bool]] = {
    "a scale": (change_constant(2, one_scale), True, False),
    "a number": (change_constant(1, one_number), True, False),
    "all scales": (change_constant(2, lambda scales: scales * np.float32(1.001)), True, False),
    "nibbles in the other order": (change_constant(1, lambda b: (b << 4) | (b >> 4)), True, False),
    "blocks shifted by one": (change_constant(1, lambda b: np.roll(b, 1, axis=1)), True, False),
    "scales of another": (swap_scales, True, False),
    "a matrix of another layer": (swap_matrices, True, False),
    "one matrix twice": (use_twice, True, False),
    "zero points off by one": (zero_points_off_by_one, True, True),
    "one matrix that keeps its input": (keep_one, False, True),
}


@pytest.mark.parametrize("name", rest_is_slow(FAULTS, quick=2))
def test_faults_are_seen_by_their_numbers_alone(name: str, int4: Path, tmp_path: Path) -> None:
    change, without_rounding, by_product = FAULTS[name]
    report = verify_bundle(changed(int4, tmp_path / "bundle", change), cases=1)
    assert not report.passed
    failed = {case.id for case in report.cases if not case.passed and case.id.endswith(TWIN)}
    assert bool(failed) == without_rounding, failed
    assert check_of(report, "activations").passed is not by_product
    assert report.guilty is not None
    assert report.guilty.stage == "layer 0"


@pytest.mark.parametrize(("changes", "passes"), [({}, True), ({"block_size": 64}, False), ({"weights": "int8"}, False)])
def test_products_of_other_blocks_are_told_apart(changes: dict[str, Any], passes: bool, int4: Path) -> None:
    bundle = open_bundle(int4)
    how = bundle.manifest.options.quantised_activations
    assert how is not None
    found = check_products(bundle, how.model_copy(update=changes), seed=7)
    assert found.check.passed is passes
    assert found.are_quantised
    said = (
        "the inputs of 28 products are rounded" if passes else "weight is not multiplied by its input rounded to int8"
    )
    assert said in found.check.detail


def keep_all(model: onnx.ModelProto) -> None:
    for node in products(model):
        kept = [each for each in node.attribute if each.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)


def test_without_a_kernel_the_ordinary_criterion_judges(int4: Path, tmp_path: Path) -> None:
    # A processor without int8 kernels computes like this.
    report = verify_bundle(changed(int4, tmp_path / "bundle", keep_all), cases=2)
    check = check_of(report, "activations")
    assert check.passed
    assert check.detail.startswith("onnxruntime has no int8 kernel for 28 products on this machine")
    assert all(case.passed for case in report.cases)
    assert all(output.activation_rmse == 0 for case in report.cases for output in case.outputs)
    # The attributes are still wrong.
    assert [each.name for each in report.contract if not each.passed] == ["quantised"]


def test_a_manifest_without_the_rounding_is_found(int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    manifest = open_bundle(int4).manifest
    how = manifest.options.quantisation
    assert how is not None
    options = manifest.options.model_copy(update={"quantisation": how.model_copy(update={"accuracy_level": 0})})
    write_manifest(path, manifest.model_copy(update={"options": options}))
    report = verify_bundle(path, cases=1)
    assert {"quantised", "golden"} <= {each.name for each in report.contract if not each.passed}
    # By the ordinary criterion, rounded activations are far off.
    assert not all(case.passed for case in report.cases)


def test_an_artifact_that_cannot_be_changed_fails(int4: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(int4, path)
    (path / "model.onnx").write_bytes(b"\x08no model")
    write_manifest(path, open_bundle(int4).manifest)
    assert not verify_bundle(path, cases=1).passed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alone": ({"weights": None}, "activations need quantised weights, but there are none; give --weights"),
    "unknown": ({"activations": "int4"}, "activations are int4; accepted: float32, int8"),
    "standard flavor": ({"onnx_flavor": None}, "give --onnx-flavor ort"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rounded_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    options = replace(INT4, **{"activations": "int8", **changes})
    with pytest.raises(InputError, match=message):
        export_bundle(read_model(SAMPLE), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_tables_say_that_there_is_an_allowance(
    int4: Path, bundles: BundleCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floats = bundles.bundle(read_model(SAMPLE), INT4)
    for path, said in ((int4, True), (floats, False)):
        page = tmp_path / "page.html"
        report = str(path / "verification.json")
        assert main(["verify", "--from-report", report, "--html", str(page)]) == 0
        # Tables wrap their lines.
        shown = " ".join(capsys.readouterr().err.split())
        text = "plus a floor and an allowance for activations that are rounded to int8"
        assert (text in shown) is said
        assert (text in page.read_text()) is said
        page.unlink()
