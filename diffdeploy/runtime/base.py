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
from diffdeploy.graphs import GraphSpec
from diffdeploy.runtime.inputs import check_inputs

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
        check_inputs(self.spec, inputs)
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
