"""What is said of every layer of a model alike, said once."""

import re
from collections.abc import Iterable

__all__ = ["by_layer", "of_layers"]

_NUMBER = re.compile(r"\.(\d+)\.")


def by_layer(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows in their order, in which names that differ in the number of a layer alone, and mean the same, are one.

    ``present.0.key`` and ``present.1.key`` become ``present.0-1.key``.
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for name, value in rows:
        found = _NUMBER.search(name)
        pattern = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
        layers.setdefault((pattern, value), []).extend([] if found is None else [int(found[1])])
    return [(pattern.replace("{}", _ranges(numbers)), value) for (pattern, value), numbers in layers.items()]


def of_layers(texts: Iterable[str]) -> str:
    """What is said of each layer, from the first on: once if it is the same of all."""
    layers: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        layers.setdefault(text, []).append(number)
    if len(layers) == 1:
        return next(iter(layers))
    return " | ".join(f"{text} in layer {_ranges(numbers)}" for text, numbers in layers.items())


def _ranges(numbers: list[int]) -> str:
    """Numbers with those that follow each other as one range."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
