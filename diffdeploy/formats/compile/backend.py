"""``compile`` bundles: inductor's artifact with the weights as its arguments, loaded without compiling."""

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffdeploy.bundle import eager_module
from diffdeploy.formats.compile.kernels import shipped
from diffdeploy.formats.options import RunOptions
from diffdeploy.formats.torch_backend import TorchBackend
from diffdeploy.graphs import run_graph

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.modules import AnyModule

__all__ = ["ARTIFACT", "KERNELS", "CompiledBackend", "state_tensors"]

ARTIFACT = "model.inductor"
KERNELS = "kernels"


def state_tensors(block: "AnyModule") -> "list[Tensor]":
    """Arguments of the artifact that precede the graph's inputs: the block's parameters, then its buffers."""
    # A tensor that modules share has a name, and is an argument, in each of them.
    named = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]


class CompiledBackend(TorchBackend):
    """Runs the artifact of `torch._inductor.standalone_compile`, or recompiles the block on request."""

    @property
    def description(self) -> str:
        """Backend, version and settings, for reports."""
        import torch

        how = "torch.compile, compiled afresh" if self._afresh else "torch.compile, warm start"
        return f"torch {torch.__version__}, {how}, {self.device.upper()}"

    def load(self, options: RunOptions) -> Callable[..., Sequence["Tensor"]]:
        """See `TorchBackend.load`."""
        self._afresh = options.recompile
        block = eager_module(self.bundle, impl=self.bundle.manifest.options.attention_impl, device=self.device)
        return self._compile(block) if options.recompile else self._warm_start(block)

    def _compile(self, block: "AnyModule") -> Callable[..., Sequence["Tensor"]]:
        import torch

        inputs, outputs, last_only = tuple(self.spec.inputs), tuple(self.spec.outputs), self.spec.logits == "last"

        def forward(*tensors: "Tensor") -> list["Tensor"]:
            results = run_graph(block, dict(zip(inputs, tensors, strict=True)), last_only=last_only)
            return [results[name] for name in outputs]

        # One graph for all sizes, or an error: no compilation per size, and no part that silently runs in eager mode.
        return torch.compile(forward, fullgraph=True, dynamic=True)

    def _warm_start(self, block: "AnyModule") -> Callable[..., Sequence["Tensor"]]:
        from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir
        from torch._inductor.standalone_compile import CompiledArtifact

        folder = self.bundle.path
        # Loading unpacks the artifact into inductor's cache; a separate folder keeps it out of the user's cache.
        with (
            tempfile.TemporaryDirectory(prefix="diffdeploy-") as cache,
            temporary_cache_dir(cache),
            shipped(folder / KERNELS),
        ):
            artifact: Any = CompiledArtifact.load(path=str(folder / ARTIFACT), format="binary")
        state = state_tensors(block)

        def call(*tensors: "Tensor") -> Sequence["Tensor"]:
            outputs: Sequence[Tensor] = artifact(*state, *tensors)
            return outputs

        return call
