"""Names that ONNX bundles use: files, flavors and onnxruntime's own operator."""

import re

__all__ = [
    "EXTERNAL_DATA",
    "FIRST_OPSET_WITH_ATTENTION",
    "MATMUL_NBITS",
    "MODEL",
    "ORT",
    "ORT_ATTENTION",
    "ORT_DOMAIN",
    "ORT_ROTARY",
    "STANDARD",
    "is_external_data",
    "layer_output",
]

MODEL = "model.onnx"
# File for weights that do not fit into a protobuf message. Above 2 GiB there are several, which onnx_ir names
# `model-00001-of-00002.onnx.data` and so on.
EXTERNAL_DATA = "model.onnx.data"
_EXTERNAL_DATA = re.compile(r"model(-\d{5}-of-\d{5})?\.onnx\.data")

# Flavors: only standard operators, or the operators that onnxruntime runs fastest.
STANDARD, ORT = "standard", "ort"
ORT_DOMAIN, ORT_ATTENTION, ORT_ROTARY = "com.microsoft", "GroupQueryAttention", "RotaryEmbedding"
# Matrix product with a quantised matrix in blocks.
MATMUL_NBITS = "MatMulNBits"

FIRST_OPSET_WITH_ATTENTION = 23


def is_external_data(name: str) -> bool:
    """Return true for the name of a file of weights that an export writes next to the model."""
    return _EXTERNAL_DATA.fullmatch(name) is not None


def layer_output(number: int) -> str:
    """Name of the output of a model's layer, which every export preserves."""
    return f"layers.{number}.output"
