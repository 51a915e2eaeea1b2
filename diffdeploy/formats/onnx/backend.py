"""Backends of ONNX bundles; onnxruntime runs with all graph optimisations, the level that production uses."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.formats.artifact import Backend, CacheBuffers
from diffdeploy.formats.onnx.names import MODEL
from diffdeploy.formats.options import RunOptions
from diffdeploy.graphs import GraphSpec, zero_inputs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OnnxCudaBackend", "OnnxReferenceBackend", "OnnxRuntimeBackend"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Numbers of onnx.TensorProto.DataType, which onnxruntime accepts for dtypes that numpy lacks.
_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


class _OnnxBackend(Backend):
    """Base class of the backends of ``model.onnx``."""

    _session: Any

    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """See `Backend.run`."""
        arrays = {
            name: value if isinstance(value, np.ndarray) else to_array(value)
            for name, value in zip(self.spec.inputs, inputs, strict=True)
        }
        outputs: list[Any] = self._session.run(list(self.spec.outputs), arrays)
        return [to_tensor(output) for output in outputs] if as_torch else outputs

    def close(self) -> None:
        """Release the session."""
        self._session = None


class _SharedBuffers(CacheBuffers):
    """Buffers for both past and present of every layer, to which onnxruntime's operator appends the new tokens."""

    def __init__(
        self, session: Any, spec: GraphSpec, batch_size: int, capacity: int, fill: float, device: tuple[str, int]
    ) -> None:
        import onnxruntime

        self._session, self._main_output = session, spec.main_output
        self.capacity = capacity
        self._binding = session.io_binding()
        self._values = {}
        for name, present in spec.caches.items():
            _, heads, _, width = spec.inputs[name].shape
            filled = np.full((batch_size, int(heads), capacity, int(width)), fill, spec.inputs[name].dtype)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(filled, *device)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(present, value)
            self._values[name] = value

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """See `CacheBuffers.run`."""
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        # Bound again in each call, since the shape changes.
        self._binding.bind_output(self._main_output)
        self._session.run_with_iobinding(self._binding)
        # Outputs are in the order in which they were first bound, so the logits come last.
        logits: Array = self._binding.get_outputs()[-1].numpy()
        return logits

    def arrays(self) -> dict[str, Array]:
        """See `CacheBuffers.arrays`."""
        return {name: value.numpy() for name, value in self._values.items()}


class OnnxReferenceBackend(_OnnxBackend):
    """Runs ``model.onnx`` with the interpreter of the onnx package: every dtype, one operator at a time, in numpy."""

    def open(self, options: RunOptions) -> None:
        """Load the model; raises ExportError if that fails."""
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


class OnnxRuntimeBackend(_OnnxBackend):
    """Runs ``model.onnx`` on the CPU execution provider."""

    def open(self, options: RunOptions) -> None:
        """Load the model; raises ExportError if that fails."""
        settings = self._settings(options)
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        self._session = self._start(settings)

    def buffers(self, batch_size: int, capacity: int, fill: float) -> CacheBuffers | None:
        """See `Backend.buffers`: the operator that counts tokens updates caches in place."""
        if self.spec.padding == "anywhere":
            return None
        return _SharedBuffers(self._session, self.spec, batch_size, capacity, fill, self._place)

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, {self.device.upper()}, all optimisations"

    @property
    def _place(self) -> tuple[str, int]:
        """Name and number of the device, as onnxruntime takes them."""
        return "cpu", 0

    def _providers(self) -> list[Any]:
        return [_CPU]

    def _settings(self, options: RunOptions) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 4  # everything that it would log is also raised
        settings.enable_cpu_mem_arena = options.keep_memory
        return settings

    def _start(self, settings: Any) -> Any:
        import onnxruntime

        model = self.bundle.path / MODEL
        try:
            return onnxruntime.InferenceSession(str(model), settings, providers=self._providers())
        except Exception as error:
            raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load {model}: {error}") from error


class OnnxCudaBackend(OnnxRuntimeBackend):
    """Runs ``model.onnx`` on the CUDA execution provider, with inputs and outputs on the device.

    Only sizes may be computed on the CPU: a graph is not loaded if onnxruntime assigns any other node to the CPU.

    Attributes:
        placement: number of nodes of the optimised graph that each execution provider runs.
    """

    placement: dict[str, int]

    def open(self, options: RunOptions) -> None:
        """Load the model; raises ExportError if that fails."""
        import onnxruntime

        # CUDA's libraries are in packages of their own, where the loader does not look; torch loads those it has.
        import torch  # noqa: F401

        onnxruntime.preload_dlls()
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings(options)
            # Only the profile shows which provider runs a node of the optimised graph.
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            self._session = self._start(settings)
            if _CUDA not in self._session.get_providers():
                # onnxruntime only logs the reason, and continues without CUDA.
                raise ExportError(
                    f"onnxruntime {onnxruntime.__version__} could not start its CUDA provider, which needs the "
                    "libraries of the CUDA version that it was built for, and a driver for them"
                )
            self.run(list(zero_inputs(self.spec).values()), as_torch=True)
            events = json.loads(Path(self._session.end_profiling()).read_text())
        nodes = {event["name"]: event["args"] for event in events if event.get("args", {}).get("provider")}
        self.placement = dict(Counter(node["provider"] for node in nodes.values()))
        slow = [name for name, node in nodes.items() if node["provider"] == _CPU and not _gives_sizes(node)]
        if slow:
            # The suffix that the profile adds to the name of a node.
            names = ", ".join(name.removesuffix("_kernel_time") for name in slow)
            raise ExportError(f"onnxruntime has no CUDA kernels for {names} and would fall back to the CPU")

    @property
    def description(self) -> str:
        """Backend, version, settings and where the nodes run, for reports."""
        placed = ", ".join(
            f"{count} nodes on {name.removesuffix('ExecutionProvider')}" for name, count in self.placement.items()
        )
        return f"{super().description}, {placed}"

    def _providers(self) -> list[Any]:
        # TensorFloat-32 is on by default, and would round float32 graphs to 10 bits.
        return [(_CUDA, {"device_id": str(self._place[1]), "use_tf32": "0"})]

    @property
    def _place(self) -> tuple[str, int]:
        """Name and number of the device, as onnxruntime takes them."""
        return "cuda", int(self.device.partition(":")[2] or 0)

    def buffers(self, batch_size: int, capacity: int, fill: float) -> CacheBuffers | None:
        """See `OnnxRuntimeBackend.buffers`; onnxruntime cannot copy bfloat16 arrays into buffers on a device."""
        return None if self.spec.dtype == "bfloat16" else super().buffers(batch_size, capacity, fill)

    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """See `Backend.run`."""
        import torch

        given = [to_tensor(value) if isinstance(value, np.ndarray) else value for value in inputs]
        # Made contiguous, since a binding takes only an address.
        tensors = dict(zip(self.spec.inputs, (t.detach().to(self.device).contiguous() for t in given), strict=True))
        # Allocated by torch, so that outputs stay on the device: a plain run returns arrays on the CPU.
        outputs = {
            name: torch.empty(shape, dtype=getattr(torch, self.spec.dtype), device=self.device)
            for name, shape in self._output_shapes(tensors).items()
        }
        binding = self._session.io_binding()
        for bind, bound, specs in (
            (binding.bind_input, tensors, self.spec.inputs),
            (binding.bind_output, outputs, self.spec.outputs),
        ):
            for name, tensor in bound.items():
                element_type = _ELEMENT_TYPES[specs[name].dtype]
                # An empty tensor has no address, and is never read.
                bind(name, *self._place, element_type, list(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream(self.device).synchronize()  # the provider has its own stream
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


def _gives_sizes(node: dict[str, Any]) -> bool:
    """True if a node of onnxruntime's profile computes only integers, such as shapes."""
    outputs = node.get("output_type_shape", [])
    return bool(outputs) and all(dtype in ("int64", "int32", "bool") for output in outputs for dtype in output)
