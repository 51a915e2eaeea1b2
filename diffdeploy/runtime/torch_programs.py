"""Bundles of exported programs and AOTInductor packages, through torch."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.runtime.base import RunOptions, Runtime

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MODEL", "AotiRuntime", "Pt2Runtime", "TorchRuntime"]

MODEL = "model.pt2"


class TorchRuntime(Runtime):
    """Runs a torch callable that takes the graph's inputs in their order."""

    _call: Any

    def _open(self, options: RunOptions) -> None:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._call = self._load(options)
        except Exception as error:
            raise ExportError(f"torch {torch.__version__} cannot load {self.bundle.path}: {error}") from error

    @abstractmethod
    def _load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """What takes the graph's inputs and gives its outputs, in their order."""

    def _run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        import torch

        # Compiled code takes memory for contiguous, whatever strides a tensor has.
        tensors = [to_tensor(value) if isinstance(value, np.ndarray) else value.contiguous() for value in inputs]
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

    def _load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        import torch

        program = torch.export.load(self.bundle.path / MODEL)
        if self.device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self.device)
        module: Callable[..., Sequence[Tensor]] = program.module()
        return module


class AotiRuntime(TorchRuntime):
    """Runs a package of AOTInductor."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, AOTInductor package, {self.device.upper()}"

    def _load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        import torch

        device = torch.device(self.device)
        package: Callable[..., Sequence[Tensor]] = torch._inductor.aoti_load_package(
            str(self.bundle.path / MODEL), device_index=-1 if device.index is None else device.index
        )
        return package
