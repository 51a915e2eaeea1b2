"""The parts of a benchmark: statistics, counted operations, the softmax block, the check, memory, reports, figures."""

import csv
import io
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffdeploy.bench import SOFTMAX, Candidate, Plan, Row, Size, changes_since, correctness, random_checkpoint
from diffdeploy.bench.candidate_choice import choose_baseline, choose_names, eager_candidates
from diffdeploy.bench.candidate_run import formula_of, inputs_of, open_candidate
from diffdeploy.bench.changes import require_comparable
from diffdeploy.bench.estimate import candidate_bytes, require_memory
from diffdeploy.bench.machine import OtherLoad, free_bytes
from diffdeploy.bench.medians import estimate, paired_ratios
from diffdeploy.bench.memory import peak_bytes
from diffdeploy.bench.operations import attention_flop, block_flop, num_pairs, projection_flop
from diffdeploy.bench.plot import plot, require_plot
from diffdeploy.bench.results import read_report
from diffdeploy.bench.table import HEADINGS, figures
from diffdeploy.bench.timing import latency_ms, num_rounds, rounds
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import DiffAttentionConfig, DiffAttentionV2Config
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.graphs import DType, Variant
from diffdeploy.ops import Impl
from diffdeploy.verify.oracle import oracle
from tests import oracles
from tests.support.bench_reports import make_report
from tests.support.blocks import make_config


@pytest.fixture(scope="module")
def block() -> Checkpoint:
    return random_checkpoint(embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=6)


def make_plan(
    block: Checkpoint,
    folder: Path,
    *sizes: Size,
    graph: Variant = "plain",
    dtype: DType = "float32",
    impls: tuple[str, ...] = ("naive",),
) -> Plan:
    from safetensors.torch import save_file

    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in block.weights.items()}
    save_file(weights, folder / "weights.safetensors")
    return Plan(
        config=block.config,
        weights=folder / "weights.safetensors",
        graph=graph,
        dtype=dtype,
        device="cpu",
        threads=1,
        sizes=sizes,
        candidates=tuple(map(Candidate.of_impl, impls)),
        baseline=impls[0],
    )


def test_the_interval_of_a_median_covers_it() -> None:
    """The exact chance that the interval misses, from the binomial distribution by itself."""
    for count in (6, 9, 12, 31):
        found = estimate([float(value) for value in range(1, count + 1)])
        assert found.low is not None
        rank = int(found.low)
        assert found.high == count + 1 - rank
        below = [math.comb(count, number) / 2**count for number in range(count + 1)]
        assert 2 * sum(below[:rank]) <= 0.05 < 2 * sum(below[: rank + 1])


def test_few_values_have_no_interval() -> None:
    found = estimate([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (found.median, found.low, found.high, found.interquartile_range) == (3.0, None, None, 2.0)
    assert estimate([7.0]).interquartile_range is None


def test_ratios_are_paired_so_that_drift_cancels() -> None:
    drift = [1.0, 1.5, 2.0, 4.0]
    assert paired_ratios([3 * each for each in drift], [*drift, 9.0]) == [3.0] * 4


@pytest.mark.parametrize(
    ("causal", "window", "length", "past"),
    [(True, None, 5, 0), (True, None, 1, 9), (True, None, 4, 3), (True, 3, 6, 2), (False, None, 4, 0)],
    ids=["causal", "step", "chunk", "window", "full"],
)
def test_counted_pairs(causal: bool, window: int | None, length: int, past: int) -> None:
    config = make_config(causal=causal, sliding_window=window)
    size = Size(batch_size=1, sequence_length=length, past_sequence_length=past)
    assert num_pairs(config, size) == oracles.visible(length, past + length, causal=causal, window=window).sum()


def test_operations_are_those_that_torch_counts(block: Checkpoint, tmp_path: Path) -> None:
    """torch counts masked pairs too, so nothing is masked here; matrix products only, as the formula does."""
    size = Size(batch_size=2, sequence_length=16)
    assert isinstance(block.config, DiffAttentionConfig)
    fields = {**vars(block.config), "causal": False, "rope": None}
    plan = make_plan(
        Checkpoint(**{**vars(block), "config": DiffAttentionConfig(**fields)}),
        tmp_path,
        size,
        impls=("two_call", SOFTMAX),
    )
    for candidate in plan.candidates:
        config, _ = formula_of(plan, candidate, block.weights)
        inputs = inputs_of(plan, config, size)
        run = open_candidate(plan, candidate, block.weights)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(inputs)
        assert block_flop(plan.config, size, candidate) == counter.get_total_flops()
    pairs = 2 * 16 * 16 * plan.config.num_heads
    assert attention_flop(plan.config, size) == 12 * plan.config.head_dim * pairs
    assert projection_flop(plan.config, size) + attention_flop(plan.config, size) == block_flop(
        plan.config, size, plan.candidates[0]
    )


@pytest.mark.parametrize("graph", ["plain", "masked", "cached"])
def test_the_softmax_block_is_plain_attention(graph: Variant, block: Checkpoint, tmp_path: Path) -> None:
    """Its output, and the exact result that it is held against, are what loops over heads and rows give."""
    size = Size(batch_size=2, sequence_length=5, past_sequence_length=4 if graph == "cached" else 0)
    plan = make_plan(block, tmp_path, size, graph=graph, impls=(SOFTMAX,))
    config, weights = formula_of(plan, plan.candidates[0], block.weights)
    inputs = inputs_of(plan, config, size)
    expected = _plain_attention(block, {name: tensor.double().numpy() for name, tensor in inputs.items()})
    exact = oracle(
        config,
        {name: tensor.double().numpy() for name, tensor in weights.items()},
        {name: tensor.numpy() for name, tensor in inputs.items()},
    )["output"]
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)
    actual = open_candidate(plan, plan.candidates[0], block.weights)(inputs)["output"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def _plain_attention(block: Checkpoint, inputs: Mapping[str, Any]) -> Any:
    config, width = block.config, block.config.head_dim
    weights = {name: tensor.double().numpy() for name, tensor in block.weights.items()}
    num_heads, num_kv_heads = 2 * config.num_heads, 2 * config.num_kv_heads
    rows = []
    for b, x in enumerate(inputs["hidden_states"]):
        q, k, v = (np.moveaxis((x @ weights[f"{n}_proj.weight"].T).reshape(len(x), -1, width), 1, 0) for n in "qkv")
        past = inputs["past_key_values.key"].shape[2] if "past_key_values.key" in inputs else 0
        positions = inputs["position_ids"][b].astype(int) if "position_ids" in inputs else np.arange(len(x))
        q, k = (np.stack([_turned(head, positions) for head in side]) for side in (q, k))
        if past:
            k = np.concatenate((inputs["past_key_values.key"][b], k), axis=1)
            v = np.concatenate((inputs["past_key_values.value"][b], v), axis=1)
        bias = np.where(oracles.visible(len(x), past + len(x), causal=True, window=None) > 0, 0.0, -np.inf)
        if "attention_mask" in inputs:
            bias = np.where(inputs["attention_mask"][b] > 0, bias, -np.inf)
        heads = np.zeros((num_heads, len(x), width))
        for head, row in np.ndindex(num_heads, len(x)):
            kv = head * num_kv_heads // num_heads
            scores = k[kv] @ q[head, row] / np.sqrt(width) + bias[row]
            if not np.isneginf(scores).all():
                heads[head, row] = oracles.softmax_row(scores) @ v[kv]
        rows.append(np.moveaxis(heads, 0, 1).reshape(len(x), -1) @ weights["out_proj.weight"].T)
    return np.stack(rows)


def _turned(head: Any, positions: Any) -> Any:
    table = np.zeros((int(positions.max()) + 1, head.shape[1]))
    turned = np.empty_like(head)
    for row, position in enumerate(positions):
        table[position] = head[row]
        turned[row] = oracles.rotate(table, "interleaved", 10000.0)[position]
    return turned


def _spoilt(run: Any, name: str) -> Any:
    def spoilt(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = dict(run(inputs))
        outputs[name] = outputs[name].clone()
        outputs[name].flatten()[-1] += 1e-3
        return outputs

    return spoilt


@pytest.mark.parametrize("largest", [2**27, 0], ids=["oracle", "fp64-block"])
@pytest.mark.parametrize("graph", ["plain", "masked", "cached"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_candidates_pass_and_wrong_ones_do_not(
    graph: Variant, dtype: DType, largest: int, block: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "MAX_ORACLE_SCORES", largest)
    size = Size(batch_size=2, sequence_length=9, past_sequence_length=7 if graph == "cached" else 0)
    impls = tuple(impl.value for impl in Impl if impl != Impl.FLASH2)
    plan = make_plan(block, tmp_path, size, graph=graph, dtype=dtype, impls=(*impls, SOFTMAX))
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in block.weights.items()}
    for candidate in plan.candidates:
        config, own_weights = formula_of(plan, candidate, weights)
        inputs = inputs_of(plan, config, size)
        expected = correctness.expected_outputs(plan, config, own_weights, inputs, size)
        run = open_candidate(plan, candidate, weights)
        verdict = correctness.judge_candidate(run, inputs, expected)
        assert verdict.passed, (candidate.name, verdict)
        assert verdict.budget_used is not None
        assert verdict.budget_used < 0.6
        if dtype == "float32":
            for name in expected:
                wrong = correctness.judge_candidate(_spoilt(run, name), inputs, expected)
                assert not wrong.passed, (candidate.name, name)


def test_a_candidate_that_raises_is_wrong(block: Checkpoint, tmp_path: Path) -> None:
    size = Size(batch_size=1, sequence_length=4)
    plan = make_plan(block, tmp_path, size)
    inputs = inputs_of(plan, plan.config, size)
    expected = correctness.expected_outputs(plan, plan.config, block.weights, inputs, size)

    def broken(_: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no kernel")

    assert correctness.judge_candidate(broken, inputs, expected).reason == "it did not run: RuntimeError: no kernel"


def test_all_take_turns_in_a_new_order_each_round() -> None:
    calls: dict[str, Any] = {name: lambda: None for name in "abcde"}
    samples = list(rounds(calls, 4, device="cpu", threads=1, seed=0))
    orders = ["".join(name for number, name, _ in samples if number == wanted) for wanted in range(4)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert len(set(orders)) > 1
    assert all(latency > 0 for _, _, latency in samples)


def test_a_sample_is_the_time_of_one_call_in_ms() -> None:
    from time import perf_counter

    def three_ms() -> None:
        end = perf_counter() + 3e-3
        while perf_counter() < end:
            pass

    assert 3.0 <= latency_ms(three_ms, device="cpu", threads=1) < 1000


def test_slow_candidates_get_fewer_rounds() -> None:
    assert num_rounds({"a": 1e-4})[0] == 31
    assert num_rounds({"a": 5.0, "b": 5.0}) == (9, 20.0)


def test_peak_memory_is_what_a_call_takes_over_what_was_there() -> None:
    mib = 2**20

    def load() -> Any:
        weights = torch.ones(16 * mib // 4)
        return lambda size: weights.sum() + torch.ones(size * mib // 4).sum()

    found = peak_bytes(load, lambda run: run(64), lambda run: run(1), device="cpu")  # type: ignore[arg-type]
    assert 79 * mib < found < 90 * mib  # the kernel counts pages of a thread in batches


def test_other_work_is_seen() -> None:
    assert OtherLoad()() >= 0.0
    environment = make_report({"naive": 1.0}).environment
    assert environment.updated(0.3, 150.0) == environment.model_copy(update={"other_load": 0.3})
    assert environment.updated(0.3, 250.0).matmul_gflop_per_second == 250.0
    assert 2**20 < free_bytes("cpu") < 2**50


def test_sizes_that_do_not_fit_are_refused(block: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(block, tmp_path, Size(batch_size=1, sequence_length=4096), impls=("padded", "naive"))
    scores = 4096**2 * plan.config.num_heads * 4
    assert candidate_bytes(plan, plan.candidates[1], plan.sizes[0]) > 4 * scores
    assert candidate_bytes(plan, plan.candidates[0], plan.sizes[0]) < scores / 4
    with pytest.raises(UnavailableError, match=r"naive at B1-S4096 needs about .* GiB, and 1\.95 GiB are free here"):
        require_memory(plan, 2_090_000_000)
    require_memory(plan, 2**40)


def test_what_is_measured_is_chosen_by_name(block: Checkpoint) -> None:
    assert choose_names("format", ["all"], ("a", "b")) == ["a", "b"]
    assert choose_names("format", ["none"], ("a", "b")) == []
    with pytest.raises(InputError, match="format 'c' is not known; accepted: a, b, all or none"):
        choose_names("format", ["a", "c"], ("a", "b"))
    found = eager_candidates(["all"], block.config, device="cpu", dtype="float32")
    assert [candidate.name for candidate in found] == [
        *("naive", "chunked", "two_call", "padded", "four_call", "stacked_split", "stacked_wide", "auto", "softmax")
    ]
    with pytest.raises(UnavailableError, match="flash2 runs on CUDA only"):
        eager_candidates(["flash2"], block.config, device="cpu", dtype="float16")
    with pytest.raises(InputError, match="flash2 does not take the padding mask of --graph cached"):
        eager_candidates(["flash2"], block.config, device="cuda", dtype="float16", graph="cached")
    second = DiffAttentionV2Config(embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
    with pytest.raises(InputError, match="of the second"):
        eager_candidates([SOFTMAX], second, device="cpu", dtype="float32")
    assert choose_baseline(None, found) == "naive"
    assert choose_baseline(None, found[2:]) == "two_call"
    with pytest.raises(InputError, match="baseline 'x' is not among what is measured"):
        choose_baseline("x", found)
    with pytest.raises(InputError, match="nothing to measure"):
        choose_baseline(None, [])
    with pytest.raises(InputError, match="two candidates are called naive"):
        choose_baseline(None, [found[0], found[0]])


def test_noise_is_no_change_and_a_change_is_one() -> None:
    old = make_report({"naive": 10.0, "padded": 5.0, "onnx": 4.0})
    new = make_report({"naive": 20.0, "padded": 10.2, "onnx": 5.0})
    found = {(change.new.name, change.new.sequence_length): change for change in changes_since(old, new)}
    assert {key for key, change in found.items() if change.significant} == {
        *(("naive", length) for length in (128, 512)),
        *(("onnx", length) for length in (128, 512)),
    }
    assert found["onnx", 128].ratio_change == pytest.approx(-0.375)
    assert found["naive", 128].latency_change == pytest.approx(1.0)
    narrow, close = (make_report({"naive": 10.0, "onnx": latency}, spread=1e-3) for latency in (5.0, 5.2))
    assert not any(change.significant for change in changes_since(narrow, close))
    wide, far = (make_report({"naive": 10.0, "onnx": latency}, spread=0.5) for latency in (5.0, 7.0))
    assert not any(change.significant for change in changes_since(wide, far))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "cached"}, "the graph was cached, and is plain"),
        ({"dtype": "float16"}, "the dtype was float16, and is float32"),
        ({"baseline": "padded"}, "the baseline was padded, and is naive"),
        ({"results": []}, "no candidate and size in common"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_of_different_things_are_not_compared(
    changes: dict[str, Any], message: str, block: Checkpoint, tmp_path: Path
) -> None:
    old = make_report({"naive": 1.0})
    plan = make_plan(block, tmp_path, old.sizes[0]).model_copy(update={"threads": 2})
    require_comparable(old, plan, old.block.model_copy(update={"source": "elsewhere"}))
    with pytest.raises(InputError, match=message):
        require_comparable(old.model_copy(update=changes), plan, old.block)
    with pytest.raises(InputError, match="the block was"):
        require_comparable(old, plan, old.block.model_copy(update={"num_heads": 4}))


def test_a_report_comes_back_from_its_json(tmp_path: Path) -> None:
    report = make_report({"naive": 10.0, "onnx": 4.0})
    file = tmp_path / "run.json"
    file.write_text(json.dumps(report.fields()))
    assert read_report(file) == report
    first, second = json.loads(file.read_text())["results"][:2]
    assert first["impl"] == "naive"
    assert "format" not in first
    assert second["format"] == "onnx"
    assert "impl" not in second
    file.write_text('{"results": [1]}')
    with pytest.raises(InputError, match="is not a result of diffdeploy bench"):
        read_report(file)


def test_csv_has_a_line_per_row_with_the_environment() -> None:
    lines = list(csv.DictReader(io.StringIO(make_report({"naive": 10.0, "onnx": 4.0}).to_csv())))
    assert [(line["name"], line["sequence_length"]) for line in lines] == [
        *(("naive", "128"), ("onnx", "128"), ("naive", "512"), ("onnx", "512"))
    ]
    assert lines[1]["latency_ms"] == "4.0"
    assert (lines[0]["cpu"], lines[0]["torch"], lines[0]["load_average"]) == ("a processor", "2", "0.1")


def test_figures_of_a_row() -> None:
    row = make_report({"naive": 10.0}).results[0]
    assert figures(row) == ["naive", "10.0", "0.5%", "1.000", "0.990-1.010", "100", "50%", "3.0", "2.0"]
    bare = Row(
        name="x",
        impl="x",
        format=None,
        batch_size=1,
        sequence_length=1,
        past_sequence_length=0,
        status="wrong",
        block_gflop=1.0,
        attention_gflop=1.0,
    )
    assert figures(bare)[:3] == ["x", "wrong", ""]
    assert len(figures(bare)) == len(HEADINGS)


def test_the_fastest_comes_first_and_what_was_not_timed_last() -> None:
    report = make_report({"naive": 10.0, "onnx": 4.0, "padded": 5.0})
    untimed = [
        row.model_copy(update={"latency_ms": None, "status": "wrong"}) if row.name == "onnx" else row
        for row in report.results
    ]
    rows = report.model_copy(update={"results": untimed}).rows_of(report.sizes[0])
    assert [row.name for row in rows] == ["padded", "naive", "onnx"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_figure_is_drawn(suffix: str, tmp_path: Path) -> None:
    names = random.Random(0).sample([f"candidate {number}" for number in range(40)], 12)
    report = make_report({"naive": 10.0, **{name: 2.0 + number for number, name in enumerate(names)}})
    file = tmp_path / f"figure{suffix}"
    plot(report, file)
    assert file.stat().st_size > 10_000
    first = file.read_bytes()
    plot(report, file)
    assert file.read_bytes() == first


def test_lines_are_told_apart_without_colour(tmp_path: Path) -> None:
    import matplotlib.figure

    drawn: list[Any] = []
    axes_of = matplotlib.figure.Figure.subplots

    def subplots(*arguments: Any, **settings: Any) -> Any:
        drawn.append(axes_of(*arguments, **settings))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "subplots", subplots)
        plot(make_report({"naive": 10.0, **{f"c{number}": 2.0 + number for number in range(13)}}), tmp_path / "x.svg")
    (axes,) = drawn[0][0]
    styles = [
        (line.get_marker(), str(line._dash_pattern), line.get_markersize())
        for line in axes.get_lines()
        if line.get_marker() not in ("None", "_", None) and len(line.get_xdata()) == 2
    ]
    assert len(styles) == 14
    assert len(set(styles)) == 14
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("matrix-product limit" in label for label in labels)
    limit = next(line for line in axes.get_lines() if "limit" in str(line.get_label()))
    assert list(limit.get_ydata()) == pytest.approx([10.0, 100.0])  # 2 and 20 GFLOP at 200 GFLOP/s, in ms
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_figures_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names that end in \.svg or \.png"):
        require_plot(tmp_path / "figure.pdf")
    with pytest.raises(InputError, match="no candidate has a latency"):
        plot(make_report({"naive": 1.0}, results=[]), tmp_path / "figure.svg")
