"""Names that ONNX bundles use: files, flavors and onnxruntime's own operator."""

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
    "layer_output",
]

MODEL = "model.onnx"
# File for weights that do not fit into a protobuf message.
EXTERNAL_DATA = "model.onnx.data"

# Flavors: only standard operators, or the operators that onnxruntime runs fastest.
STANDARD, ORT = "standard", "ort"
ORT_DOMAIN, ORT_ATTENTION, ORT_ROTARY = "com.microsoft", "GroupQueryAttention", "RotaryEmbedding"
# Matrix product with a quantised matrix in blocks.
MATMUL_NBITS = "MatMulNBits"

FIRST_OPSET_WITH_ATTENTION = 23


def layer_output(number: int) -> str:
    """Name of the output of a model's layer, which every export preserves."""
    return f"layers.{number}.output"
