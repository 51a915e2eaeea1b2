"""ONNX: the format, how it is opened, its contract, and what of it can be seen and changed."""

from diffdeploy.formats.onnx.format import OnnxFormat

__all__ = ["OnnxFormat"]
