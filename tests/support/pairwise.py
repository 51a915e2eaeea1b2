"""Fewer combinations of test parameters: every two values meet in `make test`, and all values in `make slow`."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, product

import pytest

__all__ = ["covering_rows", "each_value", "pairwise", "rest_is_slow"]


def covering_rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of value numbers in which every two values of any two parameters meet, always the same few.

    Each row starts from a pair that has not met, and takes for every other parameter the value that meets most of the
    values in the row for the first time; of equals the one that was taken least, so that triples are spread too.

    Args:
        sizes: how many values each parameter has.
    """
    if len(sizes) == 1:
        return [(number,) for number in range(sizes[0])]
    unmet = {
        frozenset({(left, i), (right, j)})
        for left, right in combinations(range(len(sizes)), 2)
        for i, j in product(range(sizes[left]), range(sizes[right]))
    }
    taken: Counter[tuple[int, int]] = Counter()

    def cost(value: tuple[int, int], row: dict[int, int]) -> tuple[int, int, int]:
        return -sum(frozenset({value, other}) in unmet for other in row.items()), taken[value], value[1]

    rows = []
    while unmet:
        row = dict(min(sorted(pair) for pair in unmet))
        for parameter in set(range(len(sizes))) - row.keys():
            values = [(parameter, number) for number in range(sizes[parameter])]
            row[parameter] = min((cost(value, row), value) for value in values)[1][1]
        taken.update(row.items())
        unmet -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append(tuple(row[parameter] for parameter in range(len(sizes))))
    return rows


def pairwise(**values: Sequence[object] | Mapping[str, object]) -> pytest.MarkDecorator:
    """Parametrise a test with all combinations of values, and leave those that show no new pair to `make slow`.

    Args:
        values: of each argument of the test; a mapping has them by their names in the ids of the tests.
    """
    return _combinations(values, covering_rows([len(each) for each in values.values()]))


def each_value(*, most: int | None = None, **values: Sequence[object] | Mapping[str, object]) -> pytest.MarkDecorator:
    """As `pairwise`, for tests that take seconds: values only have to occur, one row for each of the longest list.

    Args:
        most: of those rows, for tests that take many seconds; by default all.
        **values: see `pairwise`.
    """
    sizes = [len(each) for each in values.values()]
    return _combinations(values, [tuple(row % size for size in sizes) for row in range(max(sizes))][:most])


def rest_is_slow(values: Iterable[object], quick: int = 1) -> list[object]:
    """Parameters of which the first few are tried in `make test`, and all in `make slow`.

    Args:
        values: of one argument of the test, or tuples of several.
        quick: how many are tried in `make test`.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[] if n < quick else [pytest.mark.slow])
        for n, value in enumerate(values)
    ]


def _combinations(
    values: Mapping[str, Sequence[object] | Mapping[str, object]], quick: Collection[tuple[int, ...]]
) -> pytest.MarkDecorator:
    named = [
        list(each.items()) if isinstance(each, Mapping) else [(str(value), value) for value in each]
        for each in values.values()
    ]
    rows = [
        pytest.param(
            *(named[parameter][number][1] for parameter, number in enumerate(numbers)),
            id="-".join(named[parameter][number][0] for parameter, number in enumerate(numbers)),
            marks=[] if numbers in quick else [pytest.mark.slow],
        )
        for numbers in product(*(range(len(each)) for each in named))
    ]
    return pytest.mark.parametrize(tuple(values), rows)
