"""Changes between two runs that exceed their noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from diffdeploy.bench.models.results import ModelRow
from diffdeploy.bench.plan import Plan
from diffdeploy.bench.results import BenchReport, Block, Row
from diffdeploy.errors import InputError

__all__ = ["Change", "changes_of_rows", "changes_since", "require_comparable"]

# Rows of blocks, or of models.
AnyRow = TypeVar("AnyRow", Row, ModelRow)

# Two runs of the same code agree within this; smaller changes do not count, however narrow the intervals are.
_RUN_TO_RUN = 0.05


@dataclass(frozen=True)
class Change(Generic[AnyRow]):
    """One candidate at one size, in two runs.

    Attributes:
        old: row of the earlier run.
        new: row of this run.
        ratio_change: relative change of the ratio to the baseline; ``None`` if a run has none.
        latency_change: relative change of the latency, which also reflects the speed of the machine at the time.
        peak_change: relative change of the peak memory.
        significant: true if the confidence intervals of the ratio do not overlap, and the medians differ by more than
            5 %; for the baseline, whose ratio is always 1, the latency is compared instead.
    """

    old: AnyRow
    new: AnyRow
    ratio_change: float | None
    latency_change: float | None
    peak_change: float | None
    significant: bool


def require_comparable(old: BenchReport, plan: Plan, block: Block) -> None:
    """Check, before anything is measured, that a run can be compared with an earlier one.

    Args:
        old: the earlier run.
        plan: plan of the run.
        block: the block to measure, whose origin may differ.

    Raises:
        InputError: the runs measure different things, or have nothing in common.
    """
    require_equal(
        ("block", old.block.model_copy(update={"source": block.source}), block),
        ("graph", old.graph, plan.graph),
        ("dtype", old.dtype, plan.dtype),
        ("baseline", old.baseline, plan.baseline),
        # The machines may differ, since ratios are taken within a run; the numbers of threads may not.
        ("number of threads", old.environment.threads, plan.threads),
    )
    planned = {(candidate.name, size) for candidate in plan.candidates for size in plan.sizes}
    if not planned & {(row.name, row.size) for row in old.results}:
        raise InputError("the runs cannot be compared: they have no candidate and size in common")


def require_equal(*compared: tuple[str, object, object]) -> None:
    """Check that two runs measure the same thing.

    Args:
        *compared: name of a property, its value in the earlier run, and its value now.

    Raises:
        InputError: two values differ.
    """
    for what, then, now in compared:
        if then != now:
            raise InputError(f"the runs cannot be compared: the {what} was {then}, but is {now} now")


def changes_since(old: BenchReport, new: BenchReport) -> list[Change[Row]]:
    """Changes of all candidates and sizes in both runs, in the order of the new one."""
    return changes_of_rows(old.results, new.results, new.baseline)


def changes_of_rows(old: Sequence[AnyRow], new: Sequence[AnyRow], baseline: str) -> list[Change[AnyRow]]:
    """Changes between rows, given the name of the baseline."""
    then_rows = {(row.name, row.size): row for row in old}
    pairs = [(then_rows[row.name, row.size], row) for row in new if (row.name, row.size) in then_rows]
    return [_change(then, now, is_baseline=now.name == baseline) for then, now in pairs]


def _change(old: AnyRow, new: AnyRow, *, is_baseline: bool) -> Change[AnyRow]:
    ratio_change, latency_change = _relative(old.ratio, new.ratio), _relative(old.latency_ms, new.latency_ms)
    # The ratio of the baseline is 1 in every run; only its latency can show a change.
    if is_baseline:
        change, intervals = latency_change, (_latency_interval(old), _latency_interval(new))
    else:
        change, intervals = ratio_change, (_ratio_interval(old), _ratio_interval(new))
    return Change(
        old=old,
        new=new,
        ratio_change=ratio_change,
        latency_change=latency_change,
        peak_change=_relative(old.peak_bytes, new.peak_bytes),
        significant=change is not None and abs(change) > _RUN_TO_RUN and _apart(*intervals),
    )


_Interval = tuple[float | None, float | None]


def _ratio_interval(row: Row | ModelRow) -> _Interval:
    return row.ratio_low, row.ratio_high


def _latency_interval(row: Row | ModelRow) -> _Interval:
    return row.latency_low_ms, row.latency_high_ms


def _apart(old: _Interval, new: _Interval) -> bool:
    """True if two intervals do not overlap; false if one is unknown."""
    if old[0] is None or old[1] is None or new[0] is None or new[1] is None:
        return False
    # Stricter than a test at 5 %: two intervals may overlap although the medians differ.
    return old[1] < new[0] or new[1] < old[0]


def _relative(old: float | None, new: float | None) -> float | None:
    # Undefined relative to 0, as for a peak of 0 bytes.
    return None if not old or new is None else new / old - 1
