"""ONNX bundles through onnxruntime, with all graph optimisations on: the level that production uses."""

from typing import Any

from diffdeploy.errors import ExportError, InputError
from diffdeploy.runtime.base import Array, Runtime

__all__ = ["OnnxRuntime"]


class OnnxRuntime(Runtime):
    """Runs ``model.onnx`` on the CPU execution provider."""

    _session: Any

    def _open(self, device: str, threads: int | None) -> None:
        if device != "cpu":
            raise InputError(f"device is {device!r}; accepted is cpu")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        model = self.bundle.path / "model.onnx"
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {model}: {error}") from error

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, CPU, all optimisations"

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        names = list(self.spec.outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))
