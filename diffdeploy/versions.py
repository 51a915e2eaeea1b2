"""Installed versions of the packages that a result depends on."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_versions"]


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Version of each distribution that is installed; the others are left out."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
