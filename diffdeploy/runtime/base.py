"""The interface that every format is run through, with the input checks that backends do not make."""

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffdeploy.bundle import Bundle, open_bundle
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.graphs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Runtime", "load", "require_backend", "why_not_run"]

Array = np.ndarray[Any, np.dtype[Any]]


class _Backend(NamedTuple):
    """Where the runtime of a format is, and what it needs that the base installation does not have."""

    module: str
    class_name: str
    package: str
    extra: str


_BACKENDS = {
    "onnx": _Backend("diffdeploy.runtime.onnx", "OnnxRuntime", "onnxruntime", "cpu"),
    "pt2": _Backend("diffdeploy.runtime.torch_programs", "Pt2Runtime", "torch", "cpu"),
    "aoti": _Backend("diffdeploy.runtime.torch_programs", "AotiRuntime", "torch", "cpu"),
}


def why_not_run(format_name: str) -> str | None:
    """Why bundles of a format cannot be run here, found out without loading anything; ``None`` when they can."""
    backend = _BACKENDS.get(format_name)
    if backend is None:
        return f"this version cannot run format {format_name!r}; it runs {', '.join(_BACKENDS)}"
    if find_spec(backend.package) is None:
        return (
            f"{backend.package} is not installed, and {format_name} bundles run on it; "
            f"pip install 'diffdeploy[{backend.extra}]'"
        )
    return None


def require_backend(format_name: str) -> None:
    """Check that bundles of a format can be run here.

    Raises:
        UnavailableError: this version does not know the format, or its backend is not installed.
    """
    if reason := why_not_run(format_name):
        raise UnavailableError(reason)


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

    @property
    @abstractmethod
    def description(self) -> str:
        """Backend, version and settings, for reports."""

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
            self._check_tensor(name, spec, arrays[name], sizes)
        for total, parts in self.spec.sums.items():
            if sizes[total] != sum(sizes[part] for part in parts):
                given = " + ".join(f"{part} {sizes[part]}" for part in parts)
                raise InputError(f"{total} is {sizes[total]}; accepted is {given}")

    def _check_tensor(self, name: str, spec: TensorSpec, array: Array, sizes: dict[str, int]) -> None:
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
        if spec.values is not None and (array.min() < spec.values.min or array.max() > spec.values.max):
            raise InputError(
                f"{name} holds numbers from {array.min()} to {array.max()}; "
                f"accepted are {spec.values.min} to {spec.values.max}"
            )


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
    require_backend(bundle.manifest.format)
    backend = _BACKENDS[bundle.manifest.format]
    runtime: type[Runtime] = getattr(import_module(backend.module), backend.class_name)
    return runtime(bundle, device=device, threads=threads)
