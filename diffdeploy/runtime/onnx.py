"""ONNX bundles through onnxruntime, with all graph optimisations on: the level that production uses."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.runtime.base import RunOptions, Runtime

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OnnxCudaRuntime", "OnnxReference", "OnnxRuntime"]

MODEL = "model.onnx"
# By the numbers of onnx.TensorProto.DataType, which onnxruntime takes where numpy has no dtype.
_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


class _Onnx(Runtime):
    """What the backends of ``model.onnx`` share."""

    _session: Any

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        arrays = {
            name: value if isinstance(value, np.ndarray) else to_array(value)
            for name, value in zip(self.spec.inputs, inputs, strict=True)
        }
        outputs: list[Any] = self._session.run(list(self.spec.outputs), arrays)
        return [to_tensor(output) for output in outputs] if as_torch else outputs

    def _release(self) -> None:
        self._session = None


class OnnxReference(_Onnx):
    """Runs ``model.onnx`` with the interpreter of the onnx package: every dtype, one operator at a time, in numpy."""

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


class OnnxRuntime(_Onnx):
    """Runs ``model.onnx`` on the CPU execution provider."""

    def _open(self, options: RunOptions) -> None:
        settings = self._settings()
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        self._session = self._start(settings)

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, {self.device.upper()}, all optimisations"

    def node_placement(self) -> dict[str, int]:
        """How many nodes of the optimised graph each execution provider runs, from onnxruntime's own profile."""
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings()
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            running, self._session = self._session, self._start(settings)
            try:
                self.warmup()
                profile = Path(self._session.end_profiling())
            finally:
                self._session = running
            events = json.loads(profile.read_text())
        return dict(Counter(event["args"]["provider"] for event in events if "provider" in event.get("args", {})))

    def _providers(self) -> list[Any]:
        return ["CPUExecutionProvider"]

    def _settings(self) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        return settings

    def _start(self, settings: Any) -> Any:
        import onnxruntime

        model = self.bundle.path / MODEL
        try:
            return onnxruntime.InferenceSession(str(model), settings, providers=self._providers())
        except Exception as error:
            raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {model}: {error}") from error


class OnnxCudaRuntime(OnnxRuntime):
    """Runs ``model.onnx`` on the CUDA execution provider, from and to tensors that are on the device already.

    Nodes may not fall back to the CPU: a graph with one that has no CUDA kernel is not loaded.
    """

    def _providers(self) -> list[Any]:
        # TensorFloat-32 is on by default there, and would round float32 graphs to 10 bits.
        return [("CUDAExecutionProvider", {"device_id": str(self._index), "use_tf32": "0"})]

    def _settings(self) -> Any:
        settings = super()._settings()
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return settings

    @property
    def _index(self) -> int:
        return int(self.device.partition(":")[2] or 0)

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        import torch

        given = [to_tensor(value) if isinstance(value, np.ndarray) else value for value in inputs]
        tensors = dict(zip(self.spec.inputs, (t.detach().to(self.device).contiguous() for t in given), strict=True))
        outputs = {
            name: torch.empty(shape, dtype=tensors["hidden_states"].dtype, device=self.device)
            for name, shape in self._output_shapes(tensors).items()
        }
        binding = self._session.io_binding()
        for bind, bound, specs in (
            (binding.bind_input, tensors, self.spec.inputs),
            (binding.bind_output, outputs, self.spec.outputs),
        ):
            for name, tensor in bound.items():
                element_type = _ELEMENT_TYPES[specs[name].dtype]
                # An empty tensor has no address, and none is read.
                bind(name, "cuda", self._index, element_type, list(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream(self.device).synchronize()  # the provider has a stream of its own
        self._session.run_with_iobinding(binding)
        results = [output.to(given[0].device) for output in outputs.values()]
        return results if as_torch else [to_array(result) for result in results]

    def _output_shapes(self, tensors: "dict[str, Tensor]") -> dict[str, list[int]]:
        sizes = {
            axis: size
            for name, spec in self.spec.inputs.items()
            for axis, size in zip(spec.shape, tensors[name].shape, strict=True)
        }
        return {
            name: [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
            for name, spec in self.spec.outputs.items()
        }
