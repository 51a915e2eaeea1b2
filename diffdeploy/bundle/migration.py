"""Migration of manifests from earlier schemas to the present one; nothing else knows how they differ."""

from collections.abc import Callable
from typing import Any

from diffdeploy.errors import IntegrityError

__all__ = ["migrated"]

Fields = dict[str, Any]


def _from_1(fields: Fields) -> Fields:
    """Migrate schema 1, which did not define the fields of ``options``; its cached graphs separate the key streams.

    The shapes of such a cache remain in ``graph``, so that the artifact runs as it was exported.
    """
    return {**fields, "schema_version": 2}


def _from_2(fields: Fields) -> Fields:
    """Migrate schema 2, which lacked the versions that the artifact ``requires``; loading asks the format instead."""
    return {**fields, "schema_version": 3}


_STEPS: dict[int, Callable[[Fields], Fields]] = {1: _from_1, 2: _from_2}
_PRESENT = 3


def migrated(fields: Fields) -> Fields:
    """Convert the fields of a manifest to the present schema.

    Raises:
        IntegrityError: the schema is unknown.
    """
    given = fields.get("schema_version")
    if type(given) is not int or (given != _PRESENT and given not in _STEPS):  # True is an int, but not a schema
        accepted = ", ".join(map(str, (*_STEPS, _PRESENT)))
        raise IntegrityError(f"manifest.json has schema_version {given!r}; accepted: {accepted}")
    while fields["schema_version"] in _STEPS:
        fields = _STEPS[fields["schema_version"]](fields)
    return fields
