"""Installed versions of the packages that a result depends on."""

import re
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

__all__ = ["imported_version", "installed_versions", "release"]


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed; the others are omitted."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def imported_version(package: str) -> str:
    """Version that an installed package reports about itself.

    Args:
        package: import name. It may come from one of several distributions; if two are installed on top of each other,
            only the package itself knows which one is active.
    """
    return str(import_module(package).__version__)


def release(version: str) -> tuple[int, ...]:
    """First three numbers of a version, for comparison; a build or pre-release counts as its release.

    Args:
        version: version string, such as ``1.24``, ``2.13.0+cpu`` or ``2.14.0a0+git1234``.
    """
    numbers = re.match(r"\d+(\.\d+)*", version)
    assert numbers is not None, version
    return (*(int(number) for number in numbers[0].split(".")), 0, 0, 0)[:3]
