"""Warm starts of torch.compile: the format, its backend, its contract and its kernels."""

from diffdeploy.formats.compile.format import CompileFormat

__all__ = ["CompileFormat"]
