"""The registered formats as objects, looked up by name."""

from functools import cache
from typing import NamedTuple

from diffdeploy.errors import InputError
from diffdeploy.formats.base import Format
from diffdeploy.formats.rows import GROUP, format_names, rows

__all__ = [
    "Target",
    "distributions",
    "export_targets",
    "find_format",
    "formats",
    "require_format",
]


class Target(NamedTuple):
    """A format with one of its flavors, if it has several."""

    format: Format
    flavor: str | None = None

    @property
    def name(self) -> str:
        """Name in tables: that of the format, followed by the flavor unless that is the default."""
        usual = self.flavor is None or self.flavor == self.format.flavors[0]
        return self.format.name if usual else f"{self.format.name}-{self.flavor}"


@cache
def formats() -> dict[str, Format]:
    """All formats by name.

    Raises:
        InputError: an entry point of another package is not a format, or its name is already in use.
    """
    found: dict[str, Format] = {}
    for row in rows():
        # An entry point of another package may refer to anything.
        kind = row.load()
        is_format = isinstance(kind, type) and issubclass(kind, Format) and kind.name == row.name
        if not is_format or row.name in found:
            raise InputError(
                f"the entry point {row.name} of group {GROUP} is {row.value}; accepted: a subclass of "
                f"diffdeploy.formats.Format with that name, and a name other than {', '.join(found)}; fix or "
                "uninstall the package that provides it"
            )
        found[row.name] = kind()
    return found


def find_format(name: str) -> Format | None:
    """Look up a format in this version and its plugins; ``None`` if there is none of that name."""
    return formats().get(name)


def require_format(name: str) -> Format:
    """Look up a format by name.

    Raises:
        InputError: no format has that name.
    """
    if (found := find_format(name)) is None:
        raise InputError(f"format is {name!r}; accepted: {', '.join(format_names())}")
    return found


def export_targets() -> dict[str, Target]:
    """Everything that can be exported, each format in each of its flavors, by name."""
    targets = [Target(each, flavor) for each in formats().values() for flavor in each.flavors or (None,)]
    return {target.name: target for target in targets}


def distributions() -> tuple[str, ...]:
    """Names of the distributions on which exports and measurements of diffdeploy depend."""
    of_formats = (name for each in formats().values() for name in each.distributions)
    # Ordered and without repetition, so that equal environments give equal records.
    return tuple(dict.fromkeys(("torch", *of_formats, "numpy")))
