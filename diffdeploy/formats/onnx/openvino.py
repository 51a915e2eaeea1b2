"""The OpenVINO backend of ONNX bundles, on the CPU, in the precision of the graph or a higher one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Backend
from diffdeploy.formats.onnx.names import MODEL
from diffdeploy.formats.options import RunOptions

__all__ = ["OpenVinoBackend"]


class OpenVinoBackend(Backend):
    """Runs ``model.onnx`` with OpenVINO."""

    def open(self, options: RunOptions) -> None:
        """Load the model; raises ExportError if that fails."""
        import openvino

        # By default, OpenVINO computes in bfloat16 on processors where that is faster.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        model = self.bundle.path / MODEL
        try:
            self._compiled: Any = openvino.Core().compile_model(str(model), "CPU", settings)
        except Exception as error:
            raise ExportError(f"openvino {openvino.__version__} cannot load {model}: {error}") from error

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import openvino

        return f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU, f32"

    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """See `Backend.run`."""
        arrays = {
            name: value if isinstance(value, np.ndarray) else to_array(value)
            for name, value in zip(self.spec.inputs, inputs, strict=True)
        }
        # One request per call, for thread safety; its results are copied, since they share its memory.
        found = self._compiled.create_infer_request().infer(arrays)
        outputs = [np.array(found[name]) for name in self.spec.outputs]
        return [to_tensor(output) for output in outputs] if as_torch else outputs

    def close(self) -> None:
        """Release the model."""
        self._compiled = None
