"""Bundles of exported programs and AOTInductor packages, through torch."""

import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from diffdeploy.errors import ExportError, InputError
from diffdeploy.runtime.base import Array, Runtime

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AotiRuntime", "Pt2Runtime"]


class _TorchRuntime(Runtime):
    """Runs ``model.pt2`` on the CPU. ``threads`` are those of torch, for the whole process."""

    _call: Any

    def _open(self, device: str, threads: int | None) -> None:
        if device != "cpu":
            raise InputError(f"device is {device!r}; accepted is cpu")
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        path = self.bundle.path / "model.pt2"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._call = self._load(path)
        except Exception as error:
            raise ExportError(f"torch {torch.__version__} cannot load {path}: {error}") from error

    @abstractmethod
    def _load(self, path: "Path") -> Any:
        """The callable in the file."""

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        import torch

        tensors = [torch.from_numpy(inputs[name]) for name in self.spec.inputs]
        with torch.inference_mode():
            outputs = self._call(*tensors)
        return {name: output.numpy() for name, output in zip(self.spec.outputs, outputs, strict=True)}


class Pt2Runtime(_TorchRuntime):
    """Runs a program of `torch.export`."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, exported program, CPU"

    def _load(self, path: "Path") -> Any:
        import torch

        return torch.export.load(path).module()


class AotiRuntime(_TorchRuntime):
    """Runs a package of AOTInductor."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, AOTInductor package, CPU"

    def _load(self, path: "Path") -> Any:
        import torch

        return torch._inductor.aoti_load_package(str(path))
