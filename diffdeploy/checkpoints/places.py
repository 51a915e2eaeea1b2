"""Locations of blocks in a checkpoint: the number in a prefix that counts layers, and the choice of a block."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffdeploy.checkpoints.fields import listed
from diffdeploy.errors import InputError

__all__ = ["choose_block", "layer_numbers"]

# A name may end in a digit (`lambda_q1`, `norm2.weight`); only a number between dots is an index.
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")

# The number of layers of the deepest models.
_MOST_LAYERS = 128


def layer_numbers(prefixes: Iterable[str], keys: Iterable[str]) -> dict[str, int | None]:
    """Layer of each block, in the order of layers; ``None`` if the keys do not show it.

    A single number in a prefix is the layer. Among several, it is the one that varies within the file, such as 5 of
    ``layers.5.0.attn.`` if there is a ``layers.4.0`` but no ``layers.5.1``.

    Args:
        prefixes: prefixes of the blocks, such as ``model.layers.3.self_attn.``.
        keys: all keys of the file.
    """
    seen = _numbers_by_place(keys)
    layers = {prefix: _layer(prefix, seen) for prefix in prefixes}
    # Sorted as numbers, so that layer 10 follows 9; blocks without a number come last, by name.
    return dict(sorted(layers.items(), key=lambda item: (item[1] is None, item[1] or 0, item[0])))


def _numbers_by_place(keys: Iterable[str]) -> dict[str, set[str]]:
    """For each text that precedes a number in some key, all numbers that follow it in the keys."""
    seen: dict[str, set[str]] = {}
    for key in keys:
        for match in _NUMBER.finditer(key):
            seen.setdefault(_place(key, match), set()).add(match[0])
    return seen


def _place(text: str, number: re.Match[str]) -> str:
    """Text before a number, with other numbers replaced by ``*``, such as ``stages.*.blocks.``."""
    return _NUMBER.sub("*", text[: number.start()])


def _layer(prefix: str, seen: Mapping[str, set[str]]) -> int | None:
    found = list(_NUMBER.finditer(prefix))
    if len(found) > 1:
        found = [match for match in found if len(seen[_place(prefix, match)]) > 1]
    return int(found[0][0]) if len(found) == 1 else None


def choose_block(
    blocks: Mapping[str, int | None], path: Path, *, layer: int | None = None, prefix: str | None = None
) -> str:
    """Prefix of the requested block.

    Args:
        blocks: prefix of each block, with its layer.
        path: path of the checkpoint, for messages.
        layer: requested layer.
        prefix: requested prefix of the block's keys.

    Raises:
        InputError: no block or more than one matches the request.
    """
    beginning = "" if prefix is None else prefix.rstrip(".") + "."
    exact = [each for each in blocks if prefix is not None and each in (prefix, beginning)]
    chosen = exact or [each for each in blocks if each.startswith(beginning)]
    if not chosen:
        raise InputError(f"no block of {path} has the prefix {prefix}; there are {_named(blocks)}")
    if layer is not None:
        of_layer = [each for each in chosen if blocks[each] == layer]
        if not of_layer:
            raise InputError(f"layer {layer} is not in {path}; {_layers_said([blocks[each] for each in chosen])}")
        chosen = of_layer
    if len(chosen) == 1:
        return chosen[0]
    layers = [blocks[each] for each in chosen]
    if None not in layers and len(set(layers)) == len(layers):
        raise InputError(
            f"{path} holds several layers; choose one with --layer: {listed(map(str, layers), most=_MOST_LAYERS)}"
        )
    raise InputError(f"{path} holds several such blocks; choose one with --prefix: {_named(chosen)}")


def _layers_said(layers: Sequence[int | None]) -> str:
    known = sorted({layer for layer in layers if layer is not None})
    return f"its layers are: {listed(map(str, known), most=_MOST_LAYERS) or 'none (the keys have no layer index)'}"


def _named(prefixes: Iterable[str]) -> str:
    return listed(each.rstrip(".") or "one at the top level" for each in prefixes)
