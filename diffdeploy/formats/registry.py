"""The formats as objects; everything that asks something of a format by its name asks here."""

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
    """A format, and one of its flavors where it has several."""

    format: Format
    flavor: str | None = None

    @property
    def name(self) -> str:
        """Name in tables: the format's, with the flavor behind it unless that is the usual one."""
        usual = self.flavor is None or self.flavor == self.format.flavors[0]
        return self.format.name if usual else f"{self.format.name}-{self.flavor}"


@cache
def formats() -> dict[str, Format]:
    """All formats by name.

    Raises:
        InputError: a row that another package brings is not a format, or has a name that is taken.
    """
    found: dict[str, Format] = {}
    for row in rows():
        # An entry point of another package may name anything.
        kind = row.load()
        is_format = isinstance(kind, type) and issubclass(kind, Format) and kind.name == row.name
        if not is_format or row.name in found:
            raise InputError(
                f"the entry point {row.name} of group {GROUP} is {row.value}; accepted is a subclass of "
                f"diffdeploy.formats.Format with that name, and a name other than {', '.join(found)}; mend or "
                "uninstall the package that brings it"
            )
        found[row.name] = kind()
    return found


def find_format(name: str) -> Format | None:
    """The format of that name, if this version and its plugins have one."""
    return formats().get(name)


def require_format(name: str) -> Format:
    """The format of that name.

    Raises:
        InputError: there is none.
    """
    if (found := find_format(name)) is None:
        raise InputError(f"format is {name!r}; accepted: {', '.join(format_names())}")
    return found


def export_targets() -> dict[str, Target]:
    """By name, everything that can be exported: each format in each of its flavors."""
    targets = [Target(each, flavor) for each in formats().values() for flavor in each.flavors or (None,)]
    return {target.name: target for target in targets}


def distributions() -> tuple[str, ...]:
    """Packages that what diffdeploy makes and measures depends on, by the names that they are installed by."""
    of_formats = (name for each in formats().values() for name in each.distributions)
    # In a fixed order and once each, so that equal environments are equal records.
    return tuple(dict.fromkeys(("torch", *of_formats, "numpy")))
