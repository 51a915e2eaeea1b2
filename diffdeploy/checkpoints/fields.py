"""Typed access to ``config.json``: what stands beside the weights and says what they cannot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from diffdeploy.errors import InputError

__all__ = ["Fields", "read_config_fields", "typed_field"]

Fields = Mapping[str, Any]

_Value = TypeVar("_Value", bound=int | float | str)


def read_config_fields(weights_path: Path) -> dict[str, Any]:
    """Fields of the ``config.json`` beside the weights; empty when there is none.

    Raises:
        InputError: the file is not a JSON object.
    """
    path = weights_path.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); mend it or move it away") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds a {type(fields).__name__}; accepted is a JSON object")
    return fields


def typed_field(fields: Fields, name: str, kind: type[_Value]) -> _Value | None:
    """A field with its type checked; ``None`` when it is not there.

    Raises:
        InputError: the field has another type.
    """
    value = fields.get(name)
    # JSON does not tell 10000 from 10000.0; and to Python, though to nobody else, true is an int.
    accepted = (int, float) if kind is float else (kind,)
    if value is not None and (not isinstance(value, accepted) or isinstance(value, bool)):
        raise InputError(f"{name} in config.json is {value!r}; accepted is a {kind.__name__}")
    return cast(_Value | None, value)
