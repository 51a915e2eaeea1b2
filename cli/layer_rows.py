"""Merge rows that are the same for several layers of a model."""

import re
from collections.abc import Iterable

__all__ = ["by_layer", "of_layers"]

_NUMBER = re.compile(r"\.(\d+)\.")


def by_layer(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merge rows with equal values whose names differ only in the number of a layer; the order is kept.

    ``present.0.key`` and ``present.1.key`` become ``present.0-1.key``.
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for name, value in rows:
        found = _NUMBER.search(name)
        pattern = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
        layers.setdefault((pattern, value), []).extend([] if found is None else [int(found[1])])
    return [(pattern.replace("{}", _ranges(numbers)), value) for (pattern, value), numbers in layers.items()]


def of_layers(texts: Iterable[str]) -> str:
    """Join one text per layer, starting with layer 0; return a single text if all are the same."""
    layers: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        layers.setdefault(text, []).append(number)
    if len(layers) == 1:
        return next(iter(layers))
    return " | ".join(f"{text} in layer {_ranges(numbers)}" for text, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """Format numbers, with consecutive ones as a range."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
