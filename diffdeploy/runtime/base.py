"""The interface that every format is run through, with the input checks that backends do not make."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle
from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RunOptions", "Runtime"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a bundle is run with.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default the one that the bundle was made for.
        threads: of the backend on the CPU; by default its own choice. Those of torch are the whole process's.
        reference: run ONNX with `onnx.reference`, which is slow and knows every dtype, in place of onnxruntime.
        recompile: compile a ``compile`` bundle afresh, on a machine other than the one that it was made for.
    """

    device: str | None = None
    threads: int | None = None
    reference: bool = False
    recompile: bool = False


class Runtime(ABC):
    """A loaded bundle. Call it with the inputs by name; safe to call from several threads.

    A context manager, which closes it.

    Attributes:
        bundle: where it came from.
        spec: names, dtypes and ranges of inputs and outputs.
        device: where it runs.
    """

    def __init__(self, bundle: Bundle, options: RunOptions, device: str) -> None:
        self.bundle, self.device = bundle, device
        self.spec: GraphSpec = bundle.manifest.graph
        self._closed = False
        self._open(options)

    @property
    @abstractmethod
    def description(self) -> str:
        """Backend, version and settings, for reports."""

    @abstractmethod
    def _open(self, options: RunOptions) -> None:
        """Load the artifact into the backend."""

    @abstractmethod
    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Run checked inputs, torch tensors or arrays, and give outputs of the kind that is wanted."""

    @abstractmethod
    def _release(self) -> None:
        """Let the backend go."""

    def __call__(self, **inputs: "Tensor | Array") -> "dict[str, Any]":
        """Run the graph.

        Args:
            **inputs: torch tensors or numpy arrays, as `spec` says; bfloat16 arrays are those of ``ml_dtypes``.

        Returns:
            Outputs by name: torch tensors, where ``hidden_states`` is, if that is one; else numpy arrays.

        Raises:
            InputError: a name, dtype, shape or value is not what `spec` accepts, or the runtime is closed. Values of
                tensors on CUDA are not looked at, since that would wait for the device.
        """
        if self._closed:
            raise InputError(f"the runtime of {self.bundle.path} is closed; load the bundle again")
        if inputs.keys() != self.spec.inputs.keys():
            raise InputError(f"inputs are {sorted(inputs)}; accepted are {sorted(self.spec.inputs)}")
        self._check(inputs)
        as_torch = not isinstance(inputs["hidden_states"], np.ndarray)
        outputs = self._run([inputs[name] for name in self.spec.inputs], as_torch=as_torch)
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def warmup(self, **sizes: int) -> None:
        """Make one call, so that the first one in production does not pay for what backends put off until then.

        Args:
            **sizes: of axes, by their names; by default the smallest, and 64 positions, or as many as there can be.

        Raises:
            InputError: a size is out of its range.
        """
        axes = {name: bounds.min for name, bounds in self.spec.axes.items()}
        axes["sequence_length"] = min(64, self.spec.axes["sequence_length"].max)
        axes |= sizes
        for total, parts in self.spec.sums.items():
            axes[total] = sum(axes[part] for part in parts)
        self(
            **{
                name: np.zeros([axis if isinstance(axis, int) else axes[axis] for axis in spec.shape], spec.dtype)
                for name, spec in self.spec.inputs.items()
            }
        )

    def close(self) -> None:
        """Release the backend; later calls are refused."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, inputs: "dict[str, Any]") -> None:
        sizes: dict[str, int] = {}
        for name, spec in self.spec.inputs.items():
            self._check_tensor(name, spec, inputs[name], sizes)
        for total, parts in self.spec.sums.items():
            if sizes[total] != sum(sizes[part] for part in parts):
                given = " + ".join(f"{part} {sizes[part]}" for part in parts)
                raise InputError(f"{total} is {sizes[total]}; accepted is {given}")

    def _check_tensor(self, name: str, spec: TensorSpec, value: Any, sizes: dict[str, int]) -> None:
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise InputError(f"{name} is a {type(value).__name__}; accepted is a torch tensor or a numpy array")
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != spec.dtype:
            raise InputError(f"{name} has dtype {dtype}; accepted is {spec.dtype}")
        if len(value.shape) != len(spec.shape):
            raise InputError(f"{name} has shape {list(value.shape)}; accepted is {list(spec.shape)}")
        for given, axis in zip(value.shape, spec.shape, strict=True):
            if isinstance(axis, int):
                if given != axis:
                    raise InputError(f"{name} has shape {list(value.shape)}; accepted is {list(spec.shape)}")
                continue
            bounds = self.spec.axes[axis]
            if not bounds.min <= given <= bounds.max:
                raise InputError(f"{axis} of {name} is {given}; accepted is {bounds.min} to {bounds.max}")
            if sizes.setdefault(axis, given) != given:
                raise InputError(f"{axis} is {given} in {name}, but {sizes[axis]} in another input")
        if spec.values is not None and not getattr(value, "is_cuda", False):
            smallest, largest = int(value.min()), int(value.max())
            if smallest < spec.values.min or largest > spec.values.max:
                raise InputError(
                    f"{name} holds numbers from {smallest} to {largest}; "
                    f"accepted are {spec.values.min} to {spec.values.max}"
                )
