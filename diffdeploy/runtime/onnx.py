"""ONNX bundles through onnxruntime, with all graph optimisations on: the level that production uses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.runtime.base import RunOptions, Runtime

__all__ = ["OnnxReference", "OnnxRuntime"]

MODEL = "model.onnx"


def _as_array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else to_array(value)


class OnnxRuntime(Runtime):
    """Runs ``model.onnx`` on the CPU execution provider."""

    _session: Any

    def _open(self, options: RunOptions) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        model = self.bundle.path / MODEL
        try:
            self._session = onnxruntime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {model}: {error}") from error
        self._outputs = list(self.spec.outputs)

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, CPU, all optimisations"

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        arrays = dict(zip(self.spec.inputs, map(_as_array, inputs), strict=True))
        outputs: list[Any] = self._session.run(self._outputs, arrays)
        return [to_tensor(output) for output in outputs] if as_torch else outputs

    def _release(self) -> None:
        self._session = None


class OnnxReference(Runtime):
    """Runs ``model.onnx`` with the interpreter of the onnx package: every dtype, one operator at a time, in numpy."""

    _session: Any

    def _open(self, options: RunOptions) -> None:
        import onnx.reference

        model = self.bundle.path / MODEL
        try:
            self._session = onnx.reference.ReferenceEvaluator(str(model))
        except Exception as error:
            raise ExportError(f"onnx.reference {onnx.__version__} cannot load {model}: {error}") from error

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import onnx

        return f"onnx.reference {onnx.__version__}"

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        arrays = dict(zip(self.spec.inputs, map(_as_array, inputs), strict=True))
        outputs: list[Any] = self._session.run(list(self.spec.outputs), arrays)
        return [to_tensor(output) for output in outputs] if as_torch else outputs

    def _release(self) -> None:
        self._session = None
