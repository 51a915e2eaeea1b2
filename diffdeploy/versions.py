"""Installed versions of the packages that a result depends on."""

import re
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

__all__ = ["imported_version", "installed_versions", "release"]


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Version of each distribution that is installed; the others are left out."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def imported_version(package: str) -> str:
    """What an installed package says of itself.

    Args:
        package: import name. It may come from one of several distributions, and where two are installed over each
            other, the package alone knows which one it is.
    """
    return str(import_module(package).__version__)


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, for comparison; a build or a preview counts as its release.

    Args:
        version: such as ``1.24``, ``2.13.0+cpu`` or ``2.14.0a0+git1234``.
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    assert numbers is not None, version
    return (*(int(number) for number in numbers[0].split(".")), 0, 0, 0)[:3]
