"""A format in one module, as another package would bring it: an exported program under another name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffdeploy.arrays import Array, to_array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.formats import ArtifactFacts, Check, ExportOptions, Format, RunOptions
from diffdeploy.formats.checks import declared_facts, lambda_constant, make_check, rope_constants, weights_bit_for_bit
from diffdeploy.formats.torch_backend import TorchBackend
from diffdeploy.graphs import GraphSpec, Variant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from diffdeploy.modules import AttentionBlock

_FILE = "toy.pt2"


def _program(bundle: Bundle) -> "ExportedProgram":
    return torch.export.load(bundle.path / _FILE)


def _num_attentions(program: "ExportedProgram") -> int:
    return sum("scaled_dot_product" in str(node.target) for node in program.graph.nodes)


class _ToyBackend(TorchBackend):
    @property
    def description(self) -> str:
        return f"toy, torch {torch.__version__}"

    def load(self, options: RunOptions) -> Callable[..., "Sequence[Tensor]"]:
        module: Callable[..., Sequence[Tensor]] = _program(self.bundle).module()
        return module


class ToyFormat(Format):
    name = "toy"

    def fastest_impl(self, variant: Variant) -> str:
        return "padded"

    def lower(
        self, block: "AttentionBlock", spec: GraphSpec, directory: Path, options: ExportOptions
    ) -> Mapping[str, Any]:
        from diffdeploy.exporters.tracing import trace

        torch.export.save(trace(block, spec), directory / _FILE)
        return {}

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> _ToyBackend:
        return _ToyBackend(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        return declared_facts(bundle, _num_attentions(_program(bundle)))

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        program = _program(bundle)
        tensors = {**program.state_dict, **program.constants}
        constants = {name: to_array(tensor) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        count = _num_attentions(program)
        return [
            make_check("attention", [] if count == 2 else [f"{count} attentions; expected 2"], "2 attentions"),
            weights_bit_for_bit(constants, weights),
            lambda_constant(constants, bundle.manifest, weights),
            rope_constants(constants, bundle.manifest),
        ]

    def traces_block(self, manifest: Manifest) -> bool:
        return False  # it does, but each fault in a step would cost an export
