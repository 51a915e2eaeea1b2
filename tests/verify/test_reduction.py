"""A failure at a long length is reduced to a small one, which is what its stage is looked for with."""

from collections.abc import Callable

import pytest

from diffdeploy.verify.cases import Case
from diffdeploy.verify.reduction import smallest_failing

LONG = Case(batch_size=32, sequence_length=1500, past_length=500, seed=0, mask="mixed", repeats=True, num_queries=64)


@pytest.mark.parametrize(
    ("fails", "most"),
    [
        (lambda case: True, (1, 1, 0)),
        (lambda case: case.sequence_length > 129, (1, 200, 0)),
        (lambda case: case.past_length > 60 and case.batch_size > 2, (4, 1, 90)),
        (lambda case: case == LONG, LONG.sizes),
    ],
    ids=["always", "long", "past-and-batch", "only-that"],
)
def test_a_case_is_made_as_small_as_it_still_fails(fails: Callable[[Case], bool], most: tuple[int, int, int]) -> None:
    found = smallest_failing(LONG, fails)
    assert fails(found)
    assert all(size <= limit for size, limit in zip(found.sizes, most, strict=True))


def test_tries_are_few() -> None:
    tried: list[Case] = []

    def never(case: Case) -> bool:
        tried.append(case)
        return False

    assert smallest_failing(LONG, never) == LONG
    assert 0 < len(tried) <= 24
