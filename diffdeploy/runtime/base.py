"""The interface that every format is run through, with the input checks that backends do not make."""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.graphs import GraphSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Runtime", "load"]

Array = np.ndarray[Any, np.dtype[Any]]

_BACKENDS = {"onnx": "diffdeploy.runtime.onnx:OnnxRuntime"}


class Runtime(ABC):
    """A loaded bundle. Call it with the inputs by name; safe to call from several threads.

    Attributes:
        bundle: where it came from.
        spec: names, dtypes and ranges of inputs and outputs.
    """

    def __init__(self, bundle: Bundle, *, device: str, threads: int | None) -> None:
        self.bundle = bundle
        self.spec: GraphSpec = bundle.manifest.graph
        self._open(device, threads)

    @abstractmethod
    def _open(self, device: str, threads: int | None) -> None:
        """Load the artifact into the backend."""

    @abstractmethod
    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run checked inputs."""

    def __call__(self, **inputs: "Tensor | Array") -> "dict[str, Any]":
        """Run the graph.

        Args:
            **inputs: torch tensors or numpy arrays, as `spec` says.

        Returns:
            Outputs by name: torch tensors if the inputs were, else numpy arrays.

        Raises:
            InputError: a name, dtype, rank or size is not what `spec` accepts.
        """
        as_torch = any(hasattr(value, "detach") for value in inputs.values())
        arrays = {name: _to_numpy(name, value) for name, value in inputs.items()}
        self._check(arrays)
        outputs = self._run(arrays)
        if not as_torch:
            return outputs
        import torch

        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    def _check(self, arrays: dict[str, Array]) -> None:
        if arrays.keys() != self.spec.inputs.keys():
            raise InputError(f"inputs are {sorted(arrays)}; accepted are {sorted(self.spec.inputs)}")
        sizes: dict[str, int] = {}
        for name, spec in self.spec.inputs.items():
            array = arrays[name]
            if array.dtype.name != spec.dtype:
                raise InputError(f"{name} has dtype {array.dtype.name}; accepted is {spec.dtype}")
            if array.ndim != len(spec.shape):
                raise InputError(f"{name} has shape {list(array.shape)}; accepted is {list(spec.shape)}")
            for given, axis in zip(array.shape, spec.shape, strict=True):
                if isinstance(axis, int):
                    if given != axis:
                        raise InputError(f"{name} has shape {list(array.shape)}; accepted is {list(spec.shape)}")
                    continue
                bounds = self.spec.axes[axis]
                if not bounds.min <= given <= bounds.max:
                    raise InputError(f"{axis} of {name} is {given}; accepted is {bounds.min} to {bounds.max}")
                if sizes.setdefault(axis, given) != given:
                    raise InputError(f"{axis} is {given} in {name}, but {sizes[axis]} in another input")


def _to_numpy(name: str, value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        array: Array = value.detach().cpu().numpy()
        return array
    raise InputError(f"{name} is a {type(value).__name__}; accepted is a torch tensor or a numpy array")


def load(path: str | Path, *, device: str = "cpu", threads: int | None = None) -> Runtime:
    """Open a bundle for running; its digests are checked first.

    Args:
        path: the bundle's directory.
        device: ``cpu``.
        threads: of the backend; by default its own choice.

    Raises:
        InputError: no bundle there, or an unknown device.
        IntegrityError: the bundle is not what was exported.
        UnavailableError: the backend is not installed.
    """
    bundle = open_bundle(path)
    if bundle.manifest.format not in _BACKENDS:
        raise UnavailableError(
            f"this version cannot run format {bundle.manifest.format!r}; it runs {', '.join(_BACKENDS)}"
        )
    module, _, name = _BACKENDS[bundle.manifest.format].partition(":")
    backend: type[Runtime] = getattr(import_module(module), name)
    return backend(bundle, device=device, threads=threads)
