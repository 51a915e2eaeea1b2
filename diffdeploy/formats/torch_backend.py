"""Base class of the backends that run a torch callable."""

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
    """Runs a torch callable that takes the graph's inputs in order."""

    # The callable for the tensors of the graph, and the artifact itself.
    _call: Any
    _artifact: Any

    def open(self, options: RunOptions) -> None:
        """Load the callable.

        Raises:
            ExportError: torch cannot load it.
        """
        import torch

        if options.threads is not None:
            # torch has one thread pool for the process, and no setting for a single program.
            torch.set_num_threads(options.threads)
        try:
            with without_warnings():  # torch warns about its own internals
                self._artifact = self.load(options)
        except DiffDeployError:  # already has a message and an exit code
            raise
        except Exception as error:
            raise ExportError(f"torch {torch.__version__} cannot load {self.bundle.path}: {error}") from error
        from diffdeploy.formats.in_place import as_growing

        self._call = self._artifact if self.spec.cache == "growing" else as_growing(self.spec, self._artifact)

    @abstractmethod
    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        """Load the callable, which takes the inputs and returns the outputs of `GraphSpec.of_artifact`, in order."""

    def buffers(self, batch_size: int, capacity: int, fill: float) -> CacheBuffers | None:
        """See `Backend.buffers`; all buffers have the capacity with which the artifact was traced."""
        if self.spec.cache == "growing":
            return None
        from diffdeploy.formats.in_place import TorchBuffers

        return TorchBuffers(self.spec, self._artifact, self.device, batch_size, fill)

    def run(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Call the artifact without gradients, on the device that it was loaded for."""
        import torch

        # Compiled code assumes contiguous memory, whatever the strides of a tensor are.
        tensors = [to_tensor(value) if isinstance(value, np.ndarray) else value.contiguous() for value in inputs]
        if self.device == "cpu":
            with torch.no_grad():
                outputs = self._call(*tensors)
        else:
            # Outputs are moved to the device of the inputs, which may be the CPU.
            home = tensors[0].device
            with torch.no_grad():
                outputs = [output.to(home) for output in self._call(*(tensor.to(self.device) for tensor in tensors))]
        return outputs if as_torch else [to_array(output) for output in outputs]

    def close(self) -> None:
        """Release the callable."""
        self._call = self._artifact = None
