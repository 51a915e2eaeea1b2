"""The backend for programs of ``torch.export``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.exclusive import without_warnings
from diffdeploy.formats.options import RunOptions
from diffdeploy.formats.pt2.archive import checked_archive
from diffdeploy.formats.torch_backend import TorchBackend

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

__all__ = ["MODEL", "Pt2Backend", "load_program"]

MODEL = "model.pt2"


def load_program(directory: Path) -> "ExportedProgram":
    """Load the program of a bundle.

    Raises:
        IntegrityError: the program contains something that could run code when it is loaded.
    """
    import torch

    archive = checked_archive(directory / MODEL)
    with without_warnings():  # torch before 2.13 warns that the bytes of the weights are read-only
        return torch.export.load(archive)


class Pt2Backend(TorchBackend):
    """Runs a program of `torch.export`."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        return f"torch {torch.__version__}, exported program, {self.device.upper()}"

    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """See `TorchBackend.load`."""
        program = load_program(self.bundle.path)
        if self.device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self.device)
        module: Callable[..., Sequence[Tensor]] = program.module()
        return module
