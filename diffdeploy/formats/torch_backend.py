"""What the backends that run a torch callable share."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdeploy.arrays import to_array, to_tensor
from diffdeploy.errors import DiffDeployError, ExportError
from diffdeploy.exclusive import without_warnings
from diffdeploy.formats.artifact import Backend, CacheBuffers
from diffdeploy.formats.options import RunOptions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TorchBackend"]


class TorchBackend(Backend):
    """Runs a torch callable that takes the graph's inputs in their order."""

    # What takes the tensors of the graph, and the artifact itself.
    _call: Any
    _artifact: Any

    def open(self, options: RunOptions) -> None:
        """Load the callable.

        Raises:
            ExportError: torch cannot load it.
        """
        import torch

        if options.threads is not None:
            # Torch has one pool for the process, and no setting for a single program.
            torch.set_num_threads(options.threads)
        try:
            with without_warnings():  # torch warns of its own workings
                self._artifact = self.load(options)
        except DiffDeployError:  # which has a sentence of its own, and an exit code
            raise
        except Exception as error:
            raise ExportError(f"torch {torch.__version__} cannot load {self.bundle.path}: {error}") from error
        from diffdeploy.formats.in_place import as_growing

        self._call = self._artifact if self.spec.cache == "growing" else as_growing(self.spec, self._artifact)

    @abstractmethod
    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """Load the callable, which takes the inputs and returns the outputs of `GraphSpec.of_artifact`, in order."""

    def buffers(self, batch_size: int, capacity: int, fill: float) -> CacheBuffers | None:
        """See `Backend.buffers`; all have the capacity that the artifact was traced with."""
        if self.spec.cache == "growing":
            return None
        from diffdeploy.formats.in_place import TorchBuffers

        return TorchBuffers(self.spec, self._artifact, self.device, batch_size, fill)

    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Call it without gradients, on the device that it was loaded for."""
        import torch

        # Compiled code takes memory for contiguous, whatever strides a tensor has.
        tensors = [to_tensor(value) if isinstance(value, np.ndarray) else value.contiguous() for value in inputs]
        if self.device == "cpu":
            with torch.no_grad():
                outputs = self._call(*tensors)
        else:
            # Outputs go back to where the inputs are, which may be the CPU.
            home = tensors[0].device
            with torch.no_grad():
                outputs = [output.to(home) for output in self._call(*(tensor.to(self.device) for tensor in tensors))]
        return outputs if as_torch else [to_array(output) for output in outputs]

    def close(self) -> None:
        """Let the callable go."""
        self._call = self._artifact = None
