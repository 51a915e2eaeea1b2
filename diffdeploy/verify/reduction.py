"""Reduction of a failing case to a smaller one that also fails, which speeds up locating the fault."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from diffdeploy.verify.cases import Case

__all__ = ["smallest_failing"]

# Verifying a long case takes seconds, so a few dozen attempts must be enough.
_MAX_TRIES = 24


def smallest_failing(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Halve lengths, pasts and batches while the artifact still fails.

    Args:
        case: a failing case with one call.
        fails: function that returns true if another case fails.
    """
    tries = 0
    reduced = True
    while reduced:
        reduced = False
        for smaller in _smaller(case):
            tries += 1
            if tries > _MAX_TRIES:
                return case
            if fails(smaller):
                case, reduced = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Candidates to replace a case, the smallest first."""
    length, past, batch = case.sequence_length, case.past_length, case.batch_size
    # Three quarters are tried last, in case the fault begins just below the current size.
    for part in (1 / 8, 1 / 2, 3 / 4):
        if 1 <= (shorter := int(length * part)) < length:
            yield replace(case, sequence_length=shorter)
        if past and (fewer := int(past * part)) < past:
            yield replace(case, past_length=fewer)
    if batch > 1:
        yield replace(case, batch_size=1, repeats=False)
        yield replace(case, batch_size=max(1, batch // 2))
