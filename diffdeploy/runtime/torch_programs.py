"""Bundles of exported programs and AOTInductor packages, through torch."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.runtime.base import RunOptions, Runtime

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["AotiRuntime", "Pt2Runtime", "TorchRuntime"]


class TorchRuntime(Runtime):
    """Runs a torch callable that takes the graph's inputs in their order."""

    _call: Any

    def _open(self, options: RunOptions) -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
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

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        import torch

        tensors = [to_tensor(value) if isinstance(value, np.ndarray) else value for value in inputs]
        if self.device == "cpu":
            with torch.no_grad():
                outputs = self._call(*tensors)
        else:
            home = tensors[0].device
            with torch.no_grad():
                outputs = [output.to(home) for output in self._call(*(tensor.to(self.device) for tensor in tensors))]
        return outputs if as_torch else [to_array(output) for output in outputs]

    def _release(self) -> None:
        self._call = None


class Pt2Runtime(TorchRuntime):
    """Runs a program of `torch.export`."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, exported program, {self.device.upper()}"

    def _load(self, path: "Path") -> Any:
        import torch

        return torch.export.load(path).module()


class AotiRuntime(TorchRuntime):
    """Runs a package of AOTInductor."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, AOTInductor package, {self.device.upper()}"

    def _load(self, path: "Path") -> Any:
        import torch

        return torch._inductor.aoti_load_package(str(path))
