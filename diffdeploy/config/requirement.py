"""How configs refuse a field."""

from diffdeploy.errors import InputError

__all__ = ["require"]


def require(condition: bool, field: str, given: object, accepted: str) -> None:
    """Raise `InputError` with what was given and what is accepted, unless the condition holds."""
    if not condition:
        raise InputError(f"{field} is {given!r}, but it must be {accepted}")
