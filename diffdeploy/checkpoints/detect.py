"""Detection of a checkpoint's layout and blocks from keys and config.json, never from shapes alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffdeploy.checkpoints.fields import Fields, listed, shortened
from diffdeploy.checkpoints.layouts import LAYOUTS, UNSUPPORTED, Layout
from diffdeploy.checkpoints.places import layer_numbers
from diffdeploy.errors import InputError

__all__ = ["AUTO", "Found", "find_blocks"]

# Explicit name for the default, in which the layout is recognised.
AUTO = "auto"

# lambda_q1 itself may be the missing key. A block that lacks more keys than this belongs to another layout, for which a
# list of missing keys would be misleading.
_MOST_ABSENT = 2


@dataclass(frozen=True)
class Found:
    """The blocks of a checkpoint.

    Attributes:
        layout: the first layout that fits.
        why: reason why the layout was recognised.
        also: other layouts with the same keys, which may compute another function.
        blocks: prefix of each block, with the layer index in that prefix.
    """

    layout: Layout
    why: str
    also: tuple[Layout, ...]
    blocks: dict[str, int | None]


def _anchored(layout: Layout, keys: Iterable[str]) -> Iterator[str]:
    """Prefixes under which the layout's anchor key occurs."""
    for key in keys:
        # The dot is part of the anchor, so that `kq_proj.weight` does not match; a bare state dict has no prefix.
        if key == layout.anchor or key.endswith("." + layout.anchor):
            yield key.removesuffix(layout.anchor)


def _prefixes(layout: Layout, keys: set[str]) -> dict[str, int | None]:
    """Prefixes with all keys that the layout requires and none that it never has."""
    whole = [
        prefix
        for prefix in _anchored(layout, keys)
        if all(prefix + name in keys for name in layout.required_keys())
        and not any(prefix + name in keys for name in layout.absent)
    ]
    return layer_numbers(whole, keys)


def _reads_all(layout: Layout, blocks: Iterable[str], keys: set[str]) -> bool:
    """True if the layout reads every tensor of these blocks."""
    known = {*layout.required_keys(), *(source.key for source in layout.optional.values()), *layout.irrelevant}
    return all(key.removeprefix(prefix) in known for prefix in blocks for key in keys if key.startswith(prefix))


def find_blocks(keys: list[str], fields: Fields, layout_name: str | None, path: Path) -> Found:
    """Recognise the layout, or use the requested one.

    Args:
        keys: keys of the checkpoint.
        fields: fields of config.json.
        layout_name: name of a layout; ``None`` or ``auto`` to recognise it.
        path: path of the checkpoint, for messages.

    Raises:
        InputError: no layout fits, or the layout is known but cannot be deployed.
    """
    present, model_type = set(keys), str(fields.get("model_type", ""))
    if layout_name not in (None, AUTO):
        if layout_name not in LAYOUTS:
            raise InputError(f"layout is {layout_name!r}; accepted: {AUTO}, {', '.join(LAYOUTS)}")
        layout = LAYOUTS[layout_name]
        blocks = _prefixes(layout, present)
        if not blocks:
            raise _of_another(path, present, layout) or _not_whole(path, present, layout)
        return Found(layout, "requested", (), blocks)
    # These are checked first, since most of them have all keys of a readable layout, and one more.
    for shows, reason in UNSUPPORTED:
        if shows(present, fields):
            raise InputError(f"{path} cannot be deployed: {reason}")
    fitting = {layout: blocks for layout in LAYOUTS.values() if (blocks := _prefixes(layout, present))}
    named = [layout for layout in fitting if layout.model_types and model_type.startswith(layout.model_types)]
    if named:
        why = f"its keys, and model_type {shortened(model_type)} in config.json"
        return Found(named[0], why, (), fitting[named[0]])
    # Layouts with a model_type have tensors of equal shapes with rows in different orders, so such a layout is never
    # tried unless config.json states its model_type.
    unnamed = [layout for layout in fitting if not layout.model_types]
    # A layout that reads every tensor of the blocks is preferred to one that ignores some.
    unnamed = [each for each in unnamed if _reads_all(each, fitting[each], present)] or unnamed
    if unnamed:
        return Found(unnamed[0], "its keys", tuple(unnamed[1:]), fitting[unnamed[0]])
    if fitting:
        raise InputError(
            f"{path} has the keys of layout {next(iter(fitting)).name}, but no config.json next to it says so "
            f"(model_type is {shortened(model_type)}), and keys and shapes do not show how its heads are arranged; "
            "give --layout if you know it"
        )
    raise _not_whole(path, present, None)


def _of_another(path: Path, keys: set[str], layout: Layout) -> InputError | None:
    """Error for keys that no block of the layout has, if nothing else about the checkpoint rules the layout out."""
    for prefix in _anchored(layout, sorted(keys)):
        strange = [prefix + name for name in layout.absent if prefix + name in keys]
        if strange and all(prefix + name in keys for name in layout.required_keys()):
            return InputError(f"{path} has {listed(strange)}, which no block of layout {layout.name} has")
    return None


def _not_whole(path: Path, keys: set[str], layout: Layout | None) -> InputError:
    """Error that names the missing keys of the block that comes closest to a layout."""
    has_vectors = any(key.endswith("lambda_q1") for key in keys)
    for candidate in (layout,) if layout else LAYOUTS.values():
        for prefix in _anchored(candidate, sorted(keys)):
            absent = [prefix + name for name in candidate.required_keys() if prefix + name not in keys]
            near = has_vectors or len(absent) <= _MOST_ABSENT
            if absent and near and any(key.startswith(f"{prefix}lambda_") for key in keys):
                return InputError(f"{path} lacks the keys {listed(absent)}, so no block is complete")
    if not any("lambda_" in key for key in keys):
        return InputError(
            f"{path} has no known layout: no key contains a lambda, so it holds no differential attention "
            f"(its keys begin with {listed(sorted(keys)[:3])})"
        )
    begin = f"its keys begin with {listed(sorted(keys)[:3])}"
    if layout is not None:
        return InputError(f"{path} does not have the keys of layout {layout.name}; {begin}")
    return InputError(f"{path} has no known layout; accepted: {', '.join(LAYOUTS)}; {begin}")
