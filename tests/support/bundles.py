"""What bundles the fixtures of `tests.conftest` make."""

from collections.abc import Callable
from pathlib import Path

CPU_FORMATS = ["onnx", "onnx-ort", "pt2", "aoti", "compile"]
FormatBundle = Callable[[str], Path]
