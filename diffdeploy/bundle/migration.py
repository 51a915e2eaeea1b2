"""Manifests of earlier schemas, brought to the present one: the one place that knows how they differ."""

from collections.abc import Callable
from typing import Any

from diffdeploy.errors import IntegrityError

__all__ = ["migrated"]

Fields = dict[str, Any]


def _from_1(fields: Fields) -> Fields:
    """Schema 1 did not say which fields ``options`` may have, and its cached graphs hold the two key streams apart.

    The shapes of such a cache are in ``graph``, as they were, so that the artifact runs as it was exported.
    """
    return {**fields, "schema_version": 2}


def _from_2(fields: Fields) -> Fields:
    """Schema 2 did not say which versions the artifact ``requires``; formats know, and are asked when it is loaded."""
    return {**fields, "schema_version": 3}


_STEPS: dict[int, Callable[[Fields], Fields]] = {1: _from_1, 2: _from_2}
_PRESENT = 3


def migrated(fields: Fields) -> Fields:
    """The fields of a manifest in the present schema.

    Raises:
        IntegrityError: the schema is not known.
    """
    given = fields.get("schema_version")
    if type(given) is not int or (given != _PRESENT and given not in _STEPS):  # True is an int, and no schema
        accepted = ", ".join(map(str, (*_STEPS, _PRESENT)))
        raise IntegrityError(f"manifest.json has schema_version {given!r}; accepted is {accepted}")
    while fields["schema_version"] in _STEPS:
        fields = _STEPS[fields["schema_version"]](fields)
    return fields
