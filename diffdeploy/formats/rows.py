"""The rows of the registry: which formats there are, and where their classes live. Nothing is imported to list them.

A format from another package is an entry point of the group ``diffdeploy.formats`` that names its class.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

__all__ = ["GROUP", "format_names", "rows"]

GROUP = "diffdeploy.formats"

# As entry points, so that our own formats are loaded in the way that others are.
_BUILT_IN = (
    EntryPoint("onnx", "diffdeploy.formats.onnx:OnnxFormat", GROUP),
    EntryPoint("pt2", "diffdeploy.formats.pt2:Pt2Format", GROUP),
    EntryPoint("aoti", "diffdeploy.formats.aoti:AotiFormat", GROUP),
    EntryPoint("compile", "diffdeploy.formats.compile:CompileFormat", GROUP),
    EntryPoint("flash2", "diffdeploy.formats.flash2:Flash2Format", GROUP),
)


@cache
def rows() -> tuple[EntryPoint, ...]:
    """One row for each format, in the order of tables: our own, then those of other packages."""
    # Our own first: a name that comes again is the one to complain of.
    return (*_BUILT_IN, *entry_points(group=GROUP))


def format_names() -> tuple[str, ...]:
    """Names of all formats."""
    return tuple(dict.fromkeys(row.name for row in rows()))
