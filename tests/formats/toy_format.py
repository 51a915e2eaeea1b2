"""A format in one module, as another package would bring it: the state of the block, run eagerly."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffdeploy.arrays import Array, read_safetensors, to_array
from diffdeploy.bundle import Bundle, Manifest, eager_module
from diffdeploy.config import AnyModel
from diffdeploy.formats import ArtifactFacts, Check, ExportOptions, Format, RunOptions
from diffdeploy.formats.checks import declared_facts, lambda_constant, make_check, rope_constants, weights_bit_for_bit
from diffdeploy.formats.torch_backend import TorchBackend
from diffdeploy.graphs import GraphSpec, run_graph

if TYPE_CHECKING:
    from torch import Tensor

    from diffdeploy.modules import AnyModule

_FILE = "state.safetensors"


class _ToyBackend(TorchBackend):
    @property
    def description(self) -> str:
        return f"toy, torch {torch.__version__}"

    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        from safetensors.torch import load_file

        block = eager_module(self.bundle, impl=self.bundle.manifest.options.attention_impl)
        stored = load_file(self.bundle.path / _FILE)
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            tensor.copy_(stored[name])

        def call(*tensors: "Tensor") -> "Sequence[Tensor]":
            outputs = run_graph(block, dict(zip(self.spec.inputs, tensors, strict=True)))
            return [outputs[name] for name in self.spec.outputs]

        return call


class ToyFormat(Format):
    name = "toy"

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        return "padded"

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        import safetensors.numpy

        state = {name: to_array(tensor) for name, tensor in (*block.named_parameters(), *block.named_buffers())}
        (directory / _FILE).write_bytes(safetensors.numpy.save(state))
        return {}

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> _ToyBackend:
        return _ToyBackend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        return declared_facts(bundle, attention_ops=2)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        state = read_safetensors(bundle.path / _FILE)
        return [
            make_check("attention", [], "2 attentions"),
            weights_bit_for_bit(state, weights),
            lambda_constant(state, bundle.manifest, weights),
            rope_constants(state, bundle.manifest),
        ]

    def traces_block(self, manifest: Manifest) -> bool:
        return False
