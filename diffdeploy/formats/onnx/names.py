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
# Where weights go that do not fit into a protobuf message.
EXTERNAL_DATA = "model.onnx.data"

# Operators of the standard alone, or those that onnxruntime runs fastest.
STANDARD, ORT = "standard", "ort"
ORT_DOMAIN, ORT_ATTENTION, ORT_ROTARY = "com.microsoft", "GroupQueryAttention", "RotaryEmbedding"
# A product with a matrix in blocks of a few bits.
MATMUL_NBITS = "MatMulNBits"

FIRST_OPSET_WITH_ATTENTION = 23


def layer_output(number: int) -> str:
    """Name of the value that a layer of a model gives, which every export keeps."""
    return f"layers.{number}.output"
