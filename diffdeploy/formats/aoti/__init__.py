"""AOTInductor packages: the format, its backend, its contract, its constants and its faults."""

from diffdeploy.formats.aoti.format import AotiFormat

__all__ = ["AotiFormat"]
