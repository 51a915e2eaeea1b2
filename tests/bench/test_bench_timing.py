"""Statistics of what is measured, the order of measuring, and memory."""

import math
from typing import Any

import torch

from diffdeploy.bench.machine import OtherLoad
from diffdeploy.bench.medians import estimate, paired_ratios
from diffdeploy.bench.memory import peak_bytes
from diffdeploy.bench.timing import latency_ms, num_rounds, rounds
from tests.support.benchmarks import make_report


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
