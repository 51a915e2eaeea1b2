"""Which layout a checkpoint has and where its blocks are, from keys and config.json; never from shapes alone."""

import re
from dataclasses import dataclass
from pathlib import Path

from diffdeploy.checkpoints.layouts import LAYOUTS, UNSUPPORTED, Fields, Layout
from diffdeploy.errors import InputError

__all__ = ["AUTO", "Found", "find_blocks", "prefix_of_layer"]

# The layout that is recognised, by a name of its own for those who want to say so.
AUTO = "auto"

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Found:
    """The blocks of a checkpoint.

    Attributes:
        layout: the first layout that fits.
        why: how it was recognised.
        also: other layouts with the same keys, which may mean another function.
        blocks: prefix of each block and the layer index in it.
    """

    layout: Layout
    why: str
    also: tuple[Layout, ...]
    blocks: dict[str, int | None]


def _prefixes(layout: Layout, keys: set[str]) -> dict[str, int | None]:
    """Prefixes that hold all that the layout needs and nothing that it never has."""
    anchor = layout.anchor
    blocks: dict[str, int | None] = {}
    for key in keys:
        if key != anchor and not key.endswith("." + anchor):
            continue
        prefix = key.removesuffix(anchor)
        whole = all(prefix + name in keys for name in layout.required_keys())
        if whole and not any(prefix + name in keys for name in layout.absent):
            indices = _LAYER_INDEX.findall("." + prefix)
            blocks[prefix] = int(indices[-1]) if indices else None
    return dict(sorted(blocks.items(), key=lambda item: (item[1] is None, item[1] or 0, item[0])))


def find_blocks(keys: list[str], fields: Fields, layout_name: str | None, path: Path) -> Found:
    """Recognise the layout, or use the one that was asked for.

    Args:
        keys: of the checkpoint.
        fields: of config.json.
        layout_name: name of a layout; ``None`` or ``auto`` to recognise it.
        path: for messages.

    Raises:
        InputError: no layout fits, or it is one that is known and cannot be deployed.
    """
    present, model_type = set(keys), str(fields.get("model_type", ""))
    if layout_name not in (None, AUTO):
        if layout_name not in LAYOUTS:
            raise InputError(f"layout is {layout_name!r}; accepted: {AUTO}, {', '.join(LAYOUTS)}")
        layout = LAYOUTS[layout_name]
        blocks = _prefixes(layout, present)
        if not blocks:
            raise _not_whole(path, present, layout)
        return Found(layout, "asked for", (), blocks)
    for shows, reason in UNSUPPORTED:
        if shows(present, fields):
            raise InputError(f"{path} cannot be deployed: {reason}")
    fitting = {layout: blocks for layout in LAYOUTS.values() if (blocks := _prefixes(layout, present))}
    named = [layout for layout in fitting if layout.model_types and model_type.startswith(layout.model_types)]
    if named:
        return Found(named[0], f"its keys, and model_type {model_type!r} in config.json", (), fitting[named[0]])
    unnamed = [layout for layout in fitting if not layout.model_types]
    if unnamed:
        return Found(unnamed[0], "its keys", tuple(unnamed[1:]), fitting[unnamed[0]])
    possible = [layout for layout in fitting if layout.name != "diffdeploy"]
    if possible:
        raise InputError(
            f"{path} has the keys of layout {possible[0].name}, but no config.json beside it says so (model_type is "
            f"{model_type!r}), and keys and shapes do not tell how its heads are arranged; give --layout if you know"
        )
    raise _not_whole(path, present, None)


def _not_whole(path: Path, keys: set[str], layout: Layout | None) -> InputError:
    """What is missing from the block that is nearest to a layout."""
    for candidate in (layout,) if layout else LAYOUTS.values():
        for key in sorted(keys):
            if key != candidate.anchor and not key.endswith("." + candidate.anchor):
                continue
            prefix = key.removesuffix(candidate.anchor)
            absent = [prefix + name for name in candidate.required_keys() if prefix + name not in keys]
            differential = any((prefix + name).endswith("lambda_q1") for name in keys) or len(absent) <= 2
            if absent and differential and any(key.startswith(f"{prefix}lambda_") for key in keys):
                return InputError(f"{path} lacks the keys {', '.join(absent)}, so no block is whole")
    if not any("lambda_" in key for key in keys):
        return InputError(
            f"{path} has a layout that is not known: no key has a lambda, so it holds no differential attention "
            f"(its keys begin with {', '.join(sorted(keys)[:3])})"
        )
    begin = f"its keys begin with {', '.join(sorted(keys)[:3])}"
    if layout is not None:
        return InputError(f"{path} does not have the keys of layout {layout.name}; {begin}")
    return InputError(f"{path} has a layout that is not known; accepted are {', '.join(LAYOUTS)}, and {begin}")


def prefix_of_layer(found: Found, layer: int | None, path: Path) -> str:
    """The prefix of the block that was asked for.

    Raises:
        InputError: there are several and none was asked for, or the one asked for is not there exactly once.
    """
    blocks = found.blocks
    if len(blocks) == 1 and layer is None:
        return next(iter(blocks))
    layers = sorted(index for index in blocks.values() if index is not None)
    listed = ", ".join(map(str, layers)) or "none (the keys have no layer index)"
    if layer is None:
        raise InputError(f"{path} holds several layers; choose one with --layer: {listed}")
    chosen = [prefix for prefix, index in blocks.items() if index == layer]
    if len(chosen) != 1:
        raise InputError(f"layer {layer} is not in {path} exactly once; its layers are: {listed}")
    return chosen[0]
