"""Fewer combinations of test parameters: `make test` covers every pair of values, and `make slow` all combinations."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, product

import pytest

__all__ = ["covering_rows", "each_value", "pairwise", "rest_is_slow"]


def covering_rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Choose a few rows of value numbers, always the same, in which any two values of two parameters occur together.

    Each row starts from a pair that has not occurred yet. For every other parameter, it takes the value that forms the
    most new pairs with values in the row; among equals, it takes the one used least often, so that triples are spread
    as well.

    Args:
        sizes: number of values of each parameter.
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
    """Parametrise a test with all combinations of values, and leave those that add no new pair to `make slow`.

    Args:
        values: values of each argument of the test; the keys of a mapping are their names in the test ids.
    """
    return _combinations(values, covering_rows([len(each) for each in values.values()]))


def each_value(*, most: int | None = None, **values: Sequence[object] | Mapping[str, object]) -> pytest.MarkDecorator:
    """Parametrise like `pairwise`, but with one row in `make test` for each value of the longest list.

    This is for tests that take seconds: each value has to occur, but not each pair of values.

    Args:
        most: maximum number of those rows, for tests that take many seconds; all by default.
        **values: see `pairwise`.
    """
    sizes = [len(each) for each in values.values()]
    return _combinations(values, [tuple(row % size for size in sizes) for row in range(max(sizes))][:most])


def rest_is_slow(values: Iterable[object], quick: int = 1) -> list[object]:
    """Parameters of which the first few are tried in `make test`, and all in `make slow`.

    Args:
        values: values of one argument of the test, or tuples with values of several arguments.
        quick: number of values that are tried in `make test`.
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
