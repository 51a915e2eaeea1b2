"""From a case that fails to a smaller one that fails as well, which locating takes a fraction of the time for."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from diffdeploy.verify.cases import Case

__all__ = ["smallest_failing"]

# A verification of such a case takes seconds where it is long, so a few dozen have to do.
_MAX_TRIES = 24


def smallest_failing(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Halve lengths, pasts and batches for as long as the artifact still fails.

    Args:
        case: one that fails, in one call.
        fails: whether another one does.
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
    """Cases to try in place of one, the smallest first."""
    length, past, batch = case.sequence_length, case.past_length, case.batch_size
    # By half first; where the fault begins just below, by a quarter of it.
    for part in (1 / 8, 1 / 2, 3 / 4):
        if 1 <= (shorter := int(length * part)) < length:
            yield replace(case, sequence_length=shorter)
        if past and (fewer := int(past * part)) < past:
            yield replace(case, past_length=fewer)
    if batch > 1:
        yield replace(case, batch_size=1, repeats=False)
        yield replace(case, batch_size=max(1, batch // 2))
