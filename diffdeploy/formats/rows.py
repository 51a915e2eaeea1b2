"""The rows of the registry: names of formats and locations of their classes, listed without importing them.

A format from another package is an entry point of the group ``diffdeploy.formats`` that names its class.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

__all__ = ["GROUP", "format_names", "rows"]

GROUP = "diffdeploy.formats"

# Entry points, so that our own formats are loaded in the same way as others.
_BUILT_IN = (
    EntryPoint("onnx", "diffdeploy.formats.onnx:OnnxFormat", GROUP),
    EntryPoint("pt2", "diffdeploy.formats.pt2:Pt2Format", GROUP),
    EntryPoint("aoti", "diffdeploy.formats.aoti:AotiFormat", GROUP),
    EntryPoint("compile", "diffdeploy.formats.compile:CompileFormat", GROUP),
    EntryPoint("flash2", "diffdeploy.formats.flash2:Flash2Format", GROUP),
)


@cache
def rows() -> tuple[EntryPoint, ...]:
    """One row per format, in the order in which tables list them: our own, then those of other packages."""
    # Our own first, so that an error about a duplicate name blames the other package.
    return (*_BUILT_IN, *entry_points(group=GROUP))


def format_names() -> tuple[str, ...]:
    """List of the names of all formats."""
    return tuple(dict.fromkeys(row.name for row in rows()))
