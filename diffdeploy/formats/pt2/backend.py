"""Running a program of ``torch.export``."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffdeploy.formats.options import RunOptions
from diffdeploy.formats.torch_backend import TorchBackend

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MODEL", "Pt2Backend"]

MODEL = "model.pt2"


class Pt2Backend(TorchBackend):
    """Runs a program of `torch.export`."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, exported program, {self.device.upper()}"

    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """See `TorchBackend.load`."""
        import torch

        program = torch.export.load(self.bundle.path / MODEL)
        if self.device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self.device)
        module: Callable[..., Sequence[Tensor]] = program.module()
        return module
