"""Typed access to ``config.json``, which states what the weights alone cannot show."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from diffdeploy.errors import InputError

__all__ = ["Fields", "listed", "read_config_fields", "read_json_object", "shortened", "typed_field"]

Fields = Mapping[str, Any]

# Long enough to recognise any value that a config really contains.
_LONGEST_SHOWN = 80
_LONGEST_NAME = 100

_Value = TypeVar("_Value", bound=int | float | str)


def read_config_fields(weights_path: Path) -> dict[str, Any]:
    """Read the fields of the ``config.json`` next to the weights; empty if there is none.

    Raises:
        InputError: the file is not a JSON object.
    """
    path = weights_path.parent / "config.json"
    return read_json_object(path, "readable JSON") if path.is_file() else {}


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: file to read.
        what: description of the expected content, for the error.

    Raises:
        InputError: the file does not contain a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    # JSON nested more deeply than Python's stack is not readable either.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {what} ({_first_line(error)}); correct it or copy it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds a {type(fields).__name__}; accepted: a JSON object")
    return fields


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def typed_field(fields: Fields, name: str, kind: type[_Value]) -> _Value | None:
    """Look up a field and check its type; ``None`` if it is absent.

    Raises:
        InputError: the field has another type.
    """
    value = fields.get(name)
    # JSON does not distinguish 10000 from 10000.0; and for Python, unlike JSON, true is an int.
    accepted = (int, float) if kind is float else (kind,)
    if value is not None and (not isinstance(value, accepted) or isinstance(value, bool)):
        article = "an" if kind is int else "a"
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted: {article} {kind.__name__}")
    if kind is float and value is not None and not math.isfinite(_as_float(cast(float, value))):
        raise InputError(f"{name} in config.json is {shortened(value)}; accepted: a finite number")
    return cast(_Value | None, value)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON integers have any size
        return math.inf


def listed(names: Iterable[str], most: int = 8) -> str:
    """Format names for an error message: the first ones, each shortened to a readable length."""
    # A name may contain anything, including line breaks and terminal control characters.
    every = [name if name.isprintable() else repr(name)[1:-1] for name in names]
    shown = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..." for name in every[:most]]
    more = len(every) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def shortened(value: object) -> str:
    """Format a value for an error message, which stays one sentence whatever a file contains."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
