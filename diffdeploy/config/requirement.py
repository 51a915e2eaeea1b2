"""The check by which configs reject a field."""

from diffdeploy.errors import InputError

__all__ = ["require"]


def require(condition: bool, field: str, given: object, accepted: str) -> None:
    """Raise an `InputError` naming the given and the accepted values, unless the condition holds."""
    if not condition:
        raise InputError(f"{field} is {given!r}, but it must be {accepted}")
