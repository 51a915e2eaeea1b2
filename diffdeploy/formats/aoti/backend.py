"""The backend for AOTInductor packages."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffdeploy.formats.options import RunOptions
from diffdeploy.formats.torch_backend import TorchBackend

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MODEL", "AotiBackend"]

MODEL = "model.pt2"


class AotiBackend(TorchBackend):
    """Runs an AOTInductor package."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, AOTInductor package, {self.device.upper()}"

    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """See `TorchBackend.load`."""
        import torch

        device = torch.device(self.device)
        # torch has no public name for it.
        package: Callable[..., Sequence[Tensor]] = torch._inductor.aoti_load_package(  # noqa: SLF001
            # -1 stands for cuda without a number.
            str(self.bundle.path / MODEL),
            device_index=-1 if device.index is None else device.index,
        )
        return package
