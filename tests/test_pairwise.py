"""The few combinations that are tried of many: every two values meet, in far fewer rows."""

from itertools import combinations, product

import pytest

from tests.support.pairwise import covering_rows, each_value


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (9, 10, 2, 4, 2), (3, 3, 3, 3), (5, 1, 4)], ids=str)
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    rows = covering_rows(sizes)
    assert rows == covering_rows(sizes)
    assert set(rows) <= set(product(*map(range, sizes)))
    for left, right in combinations(range(len(sizes)), 2):
        met = {(row[left], row[right]) for row in rows}
        assert met == set(product(range(sizes[left]), range(sizes[right])))
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 1.5 * largest[0] * largest[-1]


def test_every_value_occurs_and_all_combinations_are_there() -> None:
    (_, rows) = each_value(letter="abc", number=[1, 2]).args
    quick = {row.values for row in rows if not row.marks}
    assert quick == {("a", 1), ("b", 2), ("c", 1)}
    assert {row.values for row in rows} == set(product("abc", [1, 2]))
