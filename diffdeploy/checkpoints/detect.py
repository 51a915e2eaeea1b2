"""Which layout a checkpoint has and where its blocks are, from keys and config.json; never from shapes alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffdeploy.checkpoints.fields import Fields, listed, shortened
from diffdeploy.checkpoints.layouts import LAYOUTS, UNSUPPORTED, Layout
from diffdeploy.checkpoints.places import layer_numbers
from diffdeploy.errors import InputError

__all__ = ["AUTO", "Found", "find_blocks"]

# The layout that is recognised, by a name of its own for those who want to say so.
AUTO = "auto"

# lambda_q1 itself may be what is missing; a block that lacks more than this is of another layout, and a list of its
# missing keys would mislead.
_MOST_ABSENT = 2


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


def _anchored(layout: Layout, keys: Iterable[str]) -> Iterator[str]:
    """Prefixes under which the layout's anchor stands."""
    for key in keys:
        # With its dot, so that `kq_proj.weight` is no anchor; a bare state dict has no prefix at all.
        if key == layout.anchor or key.endswith("." + layout.anchor):
            yield key.removesuffix(layout.anchor)


def _prefixes(layout: Layout, keys: set[str]) -> dict[str, int | None]:
    """Prefixes that hold all that the layout needs and nothing that it never has."""
    whole = [
        prefix
        for prefix in _anchored(layout, keys)
        if all(prefix + name in keys for name in layout.required_keys())
        and not any(prefix + name in keys for name in layout.absent)
    ]
    return layer_numbers(whole, keys)


def _reads_all(layout: Layout, blocks: Iterable[str], keys: set[str]) -> bool:
    """Whether a layout has a place for every tensor of its blocks."""
    known = {*layout.required_keys(), *(source.key for source in layout.optional.values()), *layout.irrelevant}
    return all(key.removeprefix(prefix) in known for prefix in blocks for key in keys if key.startswith(prefix))


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
            raise _of_another(path, present, layout) or _not_whole(path, present, layout)
        return Found(layout, "asked for", (), blocks)
    # First, since most of these have all keys of a layout that can be read, and one more.
    for shows, reason in UNSUPPORTED:
        if shows(present, fields):
            raise InputError(f"{path} cannot be deployed: {reason}")
    fitting = {layout: blocks for layout in LAYOUTS.values() if (blocks := _prefixes(layout, present))}
    named = [layout for layout in fitting if layout.model_types and model_type.startswith(layout.model_types)]
    if named:
        why = f"its keys, and model_type {shortened(model_type)} in config.json"
        return Found(named[0], why, (), fitting[named[0]])
    # Layouts with a model_type arrange rows of equal shapes in different orders: without it they are not even tried.
    unnamed = [layout for layout in fitting if not layout.model_types]
    # Where one layout drops a tensor that another reads, the keys do tell.
    unnamed = [each for each in unnamed if _reads_all(each, fitting[each], present)] or unnamed
    if unnamed:
        return Found(unnamed[0], "its keys", tuple(unnamed[1:]), fitting[unnamed[0]])
    if fitting:
        raise InputError(
            f"{path} has the keys of layout {next(iter(fitting)).name}, but no config.json beside it says so "
            f"(model_type is {shortened(model_type)}), and keys and shapes do not tell how its heads are arranged; "
            "give --layout if you know"
        )
    raise _not_whole(path, present, None)


def _of_another(path: Path, keys: set[str], layout: Layout) -> InputError | None:
    """What a block has that the layout never has, where that alone keeps it from being one."""
    for prefix in _anchored(layout, sorted(keys)):
        strange = [prefix + name for name in layout.absent if prefix + name in keys]
        if strange and all(prefix + name in keys for name in layout.required_keys()):
            return InputError(f"{path} has {listed(strange)}, which no block of layout {layout.name} has")
    return None


def _not_whole(path: Path, keys: set[str], layout: Layout | None) -> InputError:
    """What is missing from the block that is nearest to a layout."""
    has_vectors = any(key.endswith("lambda_q1") for key in keys)
    for candidate in (layout,) if layout else LAYOUTS.values():
        for prefix in _anchored(candidate, sorted(keys)):
            absent = [prefix + name for name in candidate.required_keys() if prefix + name not in keys]
            near = has_vectors or len(absent) <= _MOST_ABSENT
            if absent and near and any(key.startswith(f"{prefix}lambda_") for key in keys):
                return InputError(f"{path} lacks the keys {listed(absent)}, so no block is whole")
    if not any("lambda_" in key for key in keys):
        return InputError(
            f"{path} has a layout that is not known: no key has a lambda, so it holds no differential attention "
            f"(its keys begin with {listed(sorted(keys)[:3])})"
        )
    begin = f"its keys begin with {listed(sorted(keys)[:3])}"
    if layout is not None:
        return InputError(f"{path} does not have the keys of layout {layout.name}; {begin}")
    return InputError(f"{path} has a layout that is not known; accepted are {', '.join(LAYOUTS)}, and {begin}")
