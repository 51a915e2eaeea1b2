"""ONNX: the format, its backends, its contract, its constants, intermediate values and faults."""

from diffdeploy.formats.onnx.format import OnnxFormat

__all__ = ["OnnxFormat"]
