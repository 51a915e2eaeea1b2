"""Medians and their uncertainty, without a model of the noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate", "paired_ratios", "rounded", "times"]

# One minus the confidence of 95 %.
_MISS = 0.05


@dataclass(frozen=True)
class Estimate:
    """A median and its spread.

    Attributes:
        median: median of the values.
        low: lower end of the 95 % confidence interval of the median; ``None`` for fewer than six values.
        high: upper end of that interval.
        interquartile_range: distance between the quartiles of the values; ``None`` for fewer than two.
    """

    median: float
    low: float | None
    high: float | None
    interquartile_range: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Median, confidence interval and quartiles of at least one value.

    The interval lies between two order statistics, ``x_(k)`` and ``x_(n + 1 - k)`` with the largest ``k`` for which
    ``2 P(Binomial(n, 1/2) < k) <= 0.05``: it holds for every continuous distribution (H. A. David and H. N. Nagaraja,
    Order Statistics, 3rd edition, section 7.1).
    """
    ordered = sorted(values)
    rank = _rank(len(ordered))
    # Inclusive, since the default method puts the quartiles of two values outside their range.
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else None
    return Estimate(
        median=statistics.median(ordered),
        low=ordered[rank - 1] if rank else None,
        high=ordered[-rank] if rank else None,
        interquartile_range=None if quartiles is None else quartiles[2] - quartiles[0],
    )


def _rank(count: int) -> int:
    """The largest ``k`` whose interval misses the median in at most 5 % of samples; 0 if there is none."""
    missed, rank = 0.0, 0
    while rank < count // 2:
        # Doubled, for both ends.
        missed += 2 * math.comb(count, rank) / 2**count
        if missed > _MISS:
            break
        rank += 1
    return rank


def paired_ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Ratios by round, so that slowdowns of a whole round cancel out; extra rounds of either sequence are ignored."""
    return [value / base for value, base in zip(values, baseline, strict=False)]


def times(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, float | int | None]:
    """Figures of a row: its latencies in milliseconds, and their ratios to those of the baseline.

    Args:
        samples: latencies by round, at least one.
        baseline: latencies of the baseline by round; empty if it was not timed.
    """
    latency = estimate(samples)
    fields: dict[str, float | int | None] = {
        "num_rounds": len(samples),
        "latency_ms": latency.median,
        "latency_low_ms": latency.low,
        "latency_high_ms": latency.high,
        "latency_iqr_ms": latency.interquartile_range,
    }
    if ratios := paired_ratios(samples, baseline):
        ratio = estimate(ratios)
        fields |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return fields


def rounded(value: float | int | None) -> float | int | None:
    """Round to five digits, since more would suggest false precision."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
