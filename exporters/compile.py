"""``torch.compile``: inductor's artifact and its kernels, for a warm start with the same torch on the same hardware."""

import hashlib
from pathlib import Path

import torch

from diffdeploy.errors import ExportError
from diffdeploy.exporters.tracing import trace
from diffdeploy.formats.compile.backend import ARTIFACT, KERNELS, state_tensors
from diffdeploy.formats.compile.kernels import recorded
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule

__all__ = ["lower"]


def lower(block: AnyModule, spec: GraphSpec, directory: Path, device: str) -> None:
    """Write ``model.inductor`` and the folder ``kernels``; `diffdeploy.formats.compile.backend` loads them.

    The weights are arguments of the artifact, and stay in ``weights.safetensors``.

    Raises:
        ExportError: the arguments of the traced graph are not the weights of the block.
    """
    from torch._inductor import config, standalone_compile

    program = trace(block, spec, device)
    signature = program.graph_signature
    # Inductor's artifact takes what the trace lifted, in this order; the backend passes the block's own state.
    lifted = [*signature.parameters, *signature.buffers, *signature.lifted_tensor_constants]
    if len(lifted) != len(state_tensors(block)):
        raise ExportError(f"the traced graph takes {', '.join(lifted)}, which is not the state of the block")
    program = program.run_decompositions({})
    for node in program.graph.output_node().args[0]:  # where inductor looks for the symbols of the sizes
        node.meta["example_value"] = node.meta["val"]
    arguments = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    # inductor does not save what it cannot cache; `torch.cond` becomes cacheable, with a digest of its branches as key.
    branches = {"torch.ops.higher_order.cond": _digest_of_branches(program.graph_module)}
    with recorded(directory / KERNELS), config.patch(unsafe_marked_cacheable_functions=branches):
        artifact = standalone_compile(program.graph_module, arguments, dynamic_shapes="from_graph")
    artifact.save(path=str(directory / ARTIFACT), format="binary")


def _digest_of_branches(module: torch.fx.GraphModule) -> str:
    branches = [part.code for part in module.children() if isinstance(part, torch.fx.GraphModule)]
    return hashlib.sha256("".join(branches).encode()).hexdigest()
