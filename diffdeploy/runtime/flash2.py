"""``flash2`` bundles: the eager block with FlashAttention-2, on CUDA."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffdeploy.bundle import eager_block
from diffdeploy.graphs import run_block
from diffdeploy.ops import Impl
from diffdeploy.runtime.base import RunOptions
from diffdeploy.runtime.torch_programs import TorchRuntime

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Flash2Runtime"]


class Flash2Runtime(TorchRuntime):
    """Runs the block eagerly; every attention is a call of the package flash-attn."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        from importlib.metadata import version

        import torch

        return f"torch {torch.__version__}, eager, flash-attn {version('flash-attn')}, {self.device.upper()}"

    def _load(self, options: RunOptions) -> Callable[..., Sequence["Tensor"]]:
        block = eager_block(self.bundle, impl=Impl.FLASH2, device=self.device)

        def call(*tensors: "Tensor") -> Sequence["Tensor"]:
            outputs = run_block(block, dict(zip(self.spec.inputs, tensors, strict=True)))
            return [outputs[name] for name in self.spec.outputs]

        return call
