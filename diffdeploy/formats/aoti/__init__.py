"""AOTInductor packages: the format, how it is opened, its contract, and what of it can be seen and changed."""

from diffdeploy.formats.aoti.format import AotiFormat

__all__ = ["AotiFormat"]
