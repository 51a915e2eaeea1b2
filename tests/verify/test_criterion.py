"""The criterion: what is measured, what is allowed, and that saved figures give the verdict again."""

from typing import get_args

import numpy as np
import pytest

from diffdeploy.arrays import Array, epsilon
from diffdeploy.budgets import ACTIVATION_SHARE
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.exporters import ExportOptions
from diffdeploy.graphs import DType
from diffdeploy.verify import BUDGETS, Budget, OutputReport, verify_bundle
from diffdeploy.verify.metrics import Yardstick, judge, measure
from tests.support.blocks import make_config, random_weights
from tests.support.bundles import BundleCache
from tests.support.pairwise import rest_is_slow

DTYPES = get_args(DType)


def exact(shape: tuple[int, ...] = (2, 5, 8), scale: float = 1.0) -> Array:
    return np.random.default_rng(0).standard_normal(shape) * scale


def yardstick(expected: Array, dtype: DType = "float32", eager: Array | None = None) -> Yardstick:
    made = Yardstick(expected, dtype)
    made.add(expected.astype(dtype) if eager is None else eager.astype(dtype))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0], ids=["normal", "small", "zero"])
def test_correct_rounding_passes_and_twice_the_budget_fails(dtype: DType, scale: float) -> None:
    expected = exact(scale=scale)
    right = measure("output", expected.astype(dtype), yardstick(expected, dtype))
    assert right.passed
    assert right.allowed_max_error is not None
    wrong = expected.astype(dtype)
    wrong[1, 2, 3] += np.asarray(max(2 * right.allowed_max_error, 1e-6), dtype)
    failed = measure("output", wrong, yardstick(expected, dtype))
    assert not failed.passed
    assert failed.worst_index == [1, 2, 3]
    assert failed.budget_used is not None
    assert failed.budget_used > 1.5


def test_the_figures_are_what_their_names_say() -> None:
    expected, eager = np.array([[[3.0, -4.0]]]), np.array([[[3.5, -4.0]]])
    actual = np.array([[[3.0, -4.25]]], np.float32)
    # An eager block that is so far off is a yardstick of extreme inputs alone.
    report = measure("output", actual, yardstick(expected, eager=eager), is_extreme=True)
    figures = (report.rmse, report.eager_rmse, report.max_error, report.eager_max_error)
    assert figures == pytest.approx((0.25 / 2**0.5, 0.5 / 2**0.5, 0.25, 0.5), rel=1e-3)
    assert (report.exact_rms, report.exact_max) == pytest.approx((12.5**0.5, 4.0), rel=1e-3)
    budget, eps = BUDGETS["float32"], epsilon("float32")
    assert report.allowed_rmse == pytest.approx(budget.k * 0.5 / 2**0.5 + budget.rmse_floor * eps * 12.5**0.5, rel=1e-3)
    assert report.allowed_max_error == pytest.approx(budget.k * 0.5 + budget.max_floor * eps * 4.0, rel=1e-3)
    assert report.budget_used == pytest.approx(0.5 / budget.k, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_eager_is_exact_the_floors_alone_are_allowed(dtype: DType) -> None:
    expected = np.array([[[3.0, -4.0]]])
    report = measure("output", expected.astype(dtype), yardstick(expected, dtype))
    budget, eps = BUDGETS[dtype], epsilon(dtype)
    assert report.eager_max_error == 0.0
    assert report.allowed_rmse == pytest.approx(budget.rmse_floor * eps * 12.5**0.5, rel=1e-3)
    assert report.allowed_max_error == pytest.approx(budget.max_floor * eps * 4.0, rel=1e-3)


def test_quantised_activations_have_an_allowance_beside_the_budget() -> None:
    plain, moved = np.array([[[3.0, -4.0]]]), np.array([[[3.0, -4.0625]]])
    expected = plain + np.array([[[1e-2, -2e-2]]])
    quantised = yardstick(plain, eager=plain + 1e-6).with_quantised(expected)
    report = measure("output", expected.astype(np.float32), quantised)
    assert report.passed
    # Of the distance between both exact results.
    share, distance = ACTIVATION_SHARE, 2.5**0.5 * 1e-2
    assert report.activation_rmse == pytest.approx(share.rmse * distance, rel=1e-3)
    assert report.activation_max_error == pytest.approx(share.max_error * 2e-2, rel=1e-3)
    # Eager's error is that without quantised activations.
    assert report.eager_max_error == pytest.approx(1e-6, rel=0.3)
    without = judge(report.model_copy(update={"activation_rmse": 0.0}), BUDGETS["float32"], "float32").allowed_rmse
    assert without is not None
    assert report.allowed_rmse == pytest.approx(without + report.activation_rmse, rel=1e-3)
    assert without < 0.01 * report.activation_rmse
    # The error counts from the quantised result.
    wrong = measure("output", moved.astype(np.float32), quantised)
    assert wrong.max_error == pytest.approx(0.0425, rel=1e-3)
    assert not measure("output", (expected + 0.03 * share.max_error).astype(np.float32), quantised).passed
    stored = OutputReport.model_validate_json(report.model_dump_json())
    assert judge(stored, BUDGETS["float32"], "float32") == report


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_nan_and_infinity_must_be_where_they_belong(value: float) -> None:
    expected = exact()
    expected[0, 1, 2] = value
    eager = np.where(np.isfinite(expected), expected + 1e-6, expected)
    assert measure("output", expected.astype(np.float32), yardstick(expected, eager=eager)).passed
    for place, wrong in (((0, 1, 2), 1.0), ((0, 0, 0), value), ((0, 1, 2), -value if np.isinf(value) else np.inf)):
        actual = expected.astype(np.float32)
        actual[place] = wrong
        report = measure("output", actual, yardstick(expected, eager=eager))
        assert not report.passed
        assert report.budget_used is None
        assert "differs from the exact result" in str(report.reason)


def test_the_worst_index_counts_elements_without_a_number() -> None:
    expected = exact()
    expected[0] = np.nan
    actual = expected.astype(np.float32)
    actual[1, 4, 7] += 1
    assert measure("output", actual, yardstick(expected)).worst_index == [1, 4, 7]


@pytest.mark.parametrize("counted", ["all", "some", "none"])
@pytest.mark.parametrize("at_once", [1, 7, 80, 1000])
def test_an_output_is_measured_in_parts_as_it_is_whole(
    counted: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = exact()
    values = expected + 0.1 * exact((2, 5, 8), 2.0)[::-1]
    if counted != "all":
        expected[:, ::2] = np.inf
    if counted == "none":
        expected[:] = np.nan
    monkeypatch.setattr("diffdeploy.verify.metrics._AT_ONCE", at_once)
    made = Yardstick(expected, "float32")
    found = made.deviation(values)
    with np.errstate(invalid="ignore"):
        errors = np.where(np.isfinite(expected), abs(values - expected), np.nan)
    if counted == "none":
        assert found == (0.0, 0.0, 0)
        return
    assert found.mean_square == pytest.approx(np.nanmean(errors**2))
    assert found.largest == np.nanmax(errors)
    assert found.where == np.nanargmax(errors)
    # One NaN is the largest error, wherever it is.
    values[1, 1, 3] = np.nan
    assert np.isnan(made.deviation(values).largest)
    assert made.deviation(values).where == np.ravel_multi_index((1, 1, 3), (2, 5, 8))


def test_what_overflows_the_dtype_must_be_infinite() -> None:
    expected = exact()
    expected[0, 0, 0] = 1e6
    with np.errstate(over="ignore"):
        overflowed = expected.astype(np.float16)
    assert measure("output", overflowed, yardstick(expected, "float16", eager=overflowed)).passed
    clipped = np.minimum(expected, 60_000).astype(np.float16)
    assert "+inf differs" in str(measure("output", clipped, yardstick(expected, "float16", eager=overflowed)).reason)


def test_an_output_without_a_finite_number_passes_with_the_same_kinds() -> None:
    expected = np.full((1, 2, 3), np.nan)
    assert measure("output", expected.astype(np.float32), yardstick(expected)).passed


def test_a_broken_yardstick_allows_nothing() -> None:
    expected = exact()
    broken = expected.copy()
    broken[0, 0, 0] = np.nan
    report = measure("output", expected.astype(np.float32), yardstick(expected, eager=broken))
    assert not report.passed
    assert "no yardstick" in str(report.reason)


def test_where_eager_overflows_on_extreme_inputs_nothing_is_asked() -> None:
    expected = exact()
    overflowing = expected.astype(np.float32)
    overflowing[0, 0, 0] = np.nan
    held = yardstick(expected, eager=overflowing)
    for value in (np.nan, np.inf, 7.0, expected[0, 0, 0]):
        actual = expected.astype(np.float32)
        actual[0, 0, 0] = value
        report = measure("output", actual, held, is_extreme=True)
        assert report.passed
        assert report.num_unjudged == 1
    for value in (np.nan, 7.0):
        actual = expected.astype(np.float32)
        actual[0, 0, 1] = value
        assert not measure("output", actual, held, is_extreme=True).passed


def test_an_eager_block_that_is_far_off_is_no_yardstick() -> None:
    expected = exact()
    held = yardstick(expected, eager=(1.002 * expected).astype(np.float32))
    report = measure("output", (1.001 * expected).astype(np.float32), held)
    assert not report.passed
    assert str(report.reason).startswith("there is no yardstick: the eager block itself is off by 0.002 of the exact")
    # What overflows on the way is judged by its own rules.
    assert measure("output", (1.001 * expected).astype(np.float32), held, is_extreme=True).passed
    # Where the streams cancel, nothing is left that an error could be a share of.
    vanishing = 1e-12 * expected
    held = yardstick(vanishing, eager=(vanishing + 1e-9).astype(np.float32))
    assert measure("output", (vanishing + 1e-9).astype(np.float32), held).passed


def test_an_eager_block_that_is_as_exact_as_streams_that_cancel_is_a_yardstick() -> None:
    expected = exact()
    held = yardstick(expected, eager=(1.002 * expected).astype(np.float32))
    held.add_stored(1.0015 * expected)
    assert not measure("output", expected.astype(np.float32), held).passed
    held.add_stored(1.003 * expected)
    assert measure("output", expected.astype(np.float32), held).passed


def test_a_later_run_that_overflows_counts_too() -> None:
    expected = exact()
    held = yardstick(expected)
    overflowing = expected.astype(np.float32)
    overflowing[1, 2, 3] = np.inf
    held.add(overflowing)
    assert held.finite
    assert measure("output", overflowing, held, is_extreme=True).num_unjudged == 1


@pytest.mark.parametrize(
    ("lam", "format_name", "dtype"),
    rest_is_slow(
        [(1.0, "onnx", "float32"), (0.0, "onnx", "float32"), (1.0, "pt2", "bfloat16"), (0.0, "pt2", "bfloat16")]
    ),
)
def test_a_lambda_that_folds_away_is_no_false_alarm(
    lam: float, format_name: str, dtype: DType, bundles: BundleCache
) -> None:
    config = make_config(lambda_init=lam)
    weights = {name: w.float() * (not name.startswith("lambda")) for name, w in random_weights(config).items()}
    checkpoint = Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))
    options = ExportOptions(format=format_name, dtype=dtype, max_batch_size=2, max_sequence_length=70)
    report = verify_bundle(bundles.bundle(checkpoint, options, verify=False), cases="quick")
    assert report.passed, report.first_failure()


@pytest.mark.parametrize(
    "actual", [np.zeros((2, 5, 7), np.float32), np.zeros((2, 5, 8), np.float64)], ids=["shape", "dtype"]
)
def test_another_shape_or_dtype_fails(actual: Array) -> None:
    assert "expected float32 [2, 5, 8]" in str(measure("output", actual, yardstick(exact())).reason)


@pytest.mark.parametrize("dtype", rest_is_slow(["float32", "float16"]))
def test_streams_that_nearly_cancel_are_no_false_alarm(dtype: DType, bundles: BundleCache) -> None:
    """With lambda near 1 and one token, eager subtracts equal probabilities exactly, which no artifact can."""
    config = make_config(lambda_init=0.995, rope=None)
    weights = {name: w.float() * (not name.startswith("lambda")) for name, w in random_weights(config).items()}
    checkpoint = Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))
    options = ExportOptions(format="pt2", dtype=dtype, impl="two_call", max_sequence_length=16)
    report = verify_bundle(bundles.bundle(checkpoint, options, verify=False), cases="quick")
    assert report.passed, report.first_failure()
    storage_alone = [output for case in report.cases for output in case.outputs if output.storage_rmse > 0]
    without = [judge(output.model_copy(update=FREE), report.budget, dtype) for output in storage_alone]
    shares = [max(output.severity for output in outputs) for outputs in (storage_alone, without)]
    assert shares[1] > max(0.5, 1.5 * shares[0])


FREE = {"storage_rmse": 0.0, "storage_max_error": 0.0}


def figures_with(error: float, eager: float) -> OutputReport:
    return OutputReport(
        output="output",
        passed=False,
        rmse=error,
        eager_rmse=eager,
        max_error=3 * error,
        eager_max_error=3 * eager,
        exact_rms=1.0,
        exact_max=3.0,
        worst_index=[0],
    )


@pytest.mark.parametrize("error", [1e-6, 5e-6, 1e-3])
def test_the_smallest_k_is_the_one_where_the_verdict_turns(error: float) -> None:
    budget = BUDGETS["float32"]
    smallest = judge(figures_with(error, 1e-7), budget, "float32").smallest_k
    assert smallest is not None
    for factor, passed in ((1.001, True), (0.999, False)):
        changed = Budget(k=factor * smallest, rmse_floor=budget.rmse_floor, max_floor=budget.max_floor)
        assert judge(figures_with(error, 1e-7), changed, "float32").passed is passed


def test_no_k_is_enough_where_eager_is_exact() -> None:
    report = judge(figures_with(1e-3, 0.0), BUDGETS["float32"], "float32")
    assert not report.passed
    assert report.smallest_k is None
    assert judge(figures_with(1e-7, 0.0), BUDGETS["float32"], "float32").smallest_k == 0.0


def test_judging_saved_figures_gives_the_same_verdict() -> None:
    """Figures are rounded before they are judged, so that nothing is lost when they are stored."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        expected = exact((1, 1, 3))
        eager = expected + generator.standard_normal(expected.shape) * 1e-7
        actual = (expected + generator.standard_normal(expected.shape) * 1.1e-6).astype(np.float32)
        report = measure("output", actual, yardstick(expected, eager=eager))
        stored = OutputReport.model_validate_json(report.model_dump_json())
        assert judge(stored, BUDGETS["float32"], "float32") == report
