"""``flash2`` bundles: the eager block with FlashAttention-2, on CUDA."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffdeploy.bundle import eager_module
from diffdeploy.formats.options import RunOptions
from diffdeploy.formats.torch_backend import TorchBackend
from diffdeploy.graphs import run_graph

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Flash2Backend"]


class Flash2Backend(TorchBackend):
    """Runs the block eagerly; every attention is a call of the package flash-attn."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        from importlib.metadata import version

        import torch

        return f"torch {torch.__version__}, eager, flash-attn {version('flash-attn')}, {self.device.upper()}"

    def load(self, options: RunOptions) -> Callable[..., Sequence["Tensor"]]:
        """See `TorchBackend.load`."""
        block = eager_module(self.bundle, impl=self.bundle.manifest.options.attention_impl, device=self.device)

        def call(*tensors: "Tensor") -> Sequence["Tensor"]:
            outputs = run_graph(block, dict(zip(self.spec.inputs, tensors, strict=True)))
            return [outputs[name] for name in self.spec.outputs]

        return call
