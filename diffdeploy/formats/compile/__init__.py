"""Warm starts of torch.compile: the format, how it is opened, its contract, and what of it can be seen and changed."""

from diffdeploy.formats.compile.format import CompileFormat

__all__ = ["CompileFormat"]
