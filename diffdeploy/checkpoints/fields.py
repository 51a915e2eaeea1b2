"""Typed access to ``config.json``: what stands beside the weights and says what they cannot."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from diffdeploy.errors import InputError

__all__ = ["Fields", "listed", "read_config_fields", "read_json_object", "shortened", "typed_field"]

Fields = Mapping[str, Any]

# Enough to recognise any value that a config really has.
_LONGEST_SHOWN = 80
_LONGEST_NAME = 100

_Value = TypeVar("_Value", bound=int | float | str)


def read_config_fields(weights_path: Path) -> dict[str, Any]:
    """Fields of the ``config.json`` beside the weights; empty when there is none.

    Raises:
        InputError: the file is not a JSON object.
    """
    path = weights_path.parent / "config.json"
    return read_json_object(path, "readable JSON") if path.is_file() else {}


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: file to read.
        what: what it should be, for the error.

    Raises:
        InputError: the file is not that.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    # Nested more deeply than Python's stack is not readable either.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {what} ({_first_line(error)}); mend it or copy it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds a {type(fields).__name__}; accepted is a JSON object")
    return fields


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def typed_field(fields: Fields, name: str, kind: type[_Value]) -> _Value | None:
    """A field with its type checked; ``None`` when it is not there.

    Raises:
        InputError: the field has another type.
    """
    value = fields.get(name)
    # JSON does not tell 10000 from 10000.0; and to Python, though to nobody else, true is an int.
    accepted = (int, float) if kind is float else (kind,)
    if value is not None and (not isinstance(value, accepted) or isinstance(value, bool)):
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted is a {kind.__name__}")
    if kind is float and value is not None and not math.isfinite(_as_float(cast(float, value))):
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted is a finite number")
    return cast(_Value | None, value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any size
        return math.inf


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for an error message: the first ones, each as far as anybody would read it."""
    # A name may hold anything, line ends and what terminals obey included.
    every = [name if name.isprintable() else repr(name)[1:-1] for name in names]
    shown = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..." for name in every[:most]]
    more = len(every) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def shortened(value: object) -> str:
    """A value for an error message, which stays one sentence whatever a file holds."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
