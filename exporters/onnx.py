"""Lowering to ONNX: standard operators, two attentions per layer, nothing that does not depend on the input."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffdeploy.arrays import read_safetensors
from diffdeploy.bundle import WEIGHTS, Quantisation
from diffdeploy.config import AnyConfig
from diffdeploy.errors import ExportError, InputError
from diffdeploy.exporters.onnx_nbits import quantise_products
from diffdeploy.exporters.onnx_norms import small_epsilons_kept
from diffdeploy.exporters.onnx_ort import OrtGraphModule
from diffdeploy.exporters.onnx_ort_model import OrtModelModule, require_ort_model
from diffdeploy.exporters.onnx_ties import tie_head
from diffdeploy.exporters.tracing import GraphModule, example
from diffdeploy.formats.onnx.names import EXTERNAL_DATA, MODEL, ORT, layer_output
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule, AttentionBlock, DiffTransformer

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["lower"]

# A protobuf message ends at 2 GiB, and whoever reads one holds it twice; a file beside it is mapped.
_MAX_INLINE_BYTES = 64 * 2**20


def lower(
    block: AnyModule,
    spec: GraphSpec,
    directory: Path,
    *,
    opset: int,
    flavor: str,
    quantisation: Quantisation | None = None,
) -> None:
    """Write ``model.onnx`` into ``directory``; weights above 64 MiB go to ``model.onnx.data`` beside it.

    Args:
        block: frozen block in the dtype of the graph.
        spec: interface of the graph.
        directory: existing directory.
        opset: operator set; from 23 on the attentions are ``Attention`` nodes, below they are decomposed.
        flavor: ``standard`` or ``ort``.
        quantisation: of the matrices in the weights file that is in ``directory``.

    Raises:
        InputError: a block that the operators of the flavor cannot compute.
        ExportError: the block could not be lowered.
    """
    graph: nn.Module = GraphModule(block, spec)
    names = list(spec.outputs)
    if isinstance(block, DiffTransformer):
        graph = _WithLayers(block, spec)
        names += map(layer_output, range(block.config.num_layers))
    # Modules of their own: which operators are written is decided while the block is traced.
    if flavor == ORT and isinstance(block, DiffTransformer):
        require_ort_model(block.config)
        graph = OrtModelModule(block, spec)
    elif flavor == ORT and isinstance(block, AttentionBlock):
        _require_ort(block.config)
        graph = OrtGraphModule(block, spec)
    with _scores_in_float32(), small_epsilons_kept(block, opset):
        program = _export(graph.eval(), spec, names, opset)
    # Named while they were outputs; between layers, verification looks at them.
    del program.graph.outputs[len(spec.outputs) :]
    if isinstance(block, DiffTransformer) and block.config.tied:
        tie_head(program, block.config.vocab_size, block.config.embed_dim)
    if quantisation is not None:
        quantise_products(program, read_safetensors(directory / WEIGHTS), block.config, quantisation)
    _name_axes(program, spec)
    _strip_metadata(program)
    _save(program, directory)


class _WithLayers(GraphModule):
    """A model whose layers' outputs are outputs of the graph as well."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model, and take what each layer gives."""
        given: list[Tensor] = []
        assert isinstance(self.block, DiffTransformer)
        hooks = [
            layer.register_forward_hook(lambda _layer, _inputs, outputs: given.append(outputs[0]))
            for layer in self.block.layers
        ]
        try:
            outputs = super().forward(*tensors)
        finally:
            for hook in hooks:
                hook.remove()
        return (*outputs, *given)


def _scores_in_float32() -> TorchFunctionMode:
    """Within it attentions of float16 are traced as casts to float32, the attention, and a cast back.

    onnxruntime's CPU keeps scores in the dtype of the queries. Outliers, as activations of language models have them,
    make some beyond 65504, and infinity minus infinity is NaN, also where a mask hides that score from the query. It
    has no product in float16 either, so that the casts cost nothing: 28.5 ms and 28.1 ms at 512 positions of 8 heads.
    """
    attention = torch.nn.functional.scaled_dot_product_attention

    class InFloat32(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is not attention or args[0].dtype != torch.float16:
                return function(*args, **kwargs)
            return function(*(side.float() for side in args), **kwargs).half()

    return InFloat32()


def _require_ort(config: AnyConfig) -> None:
    if not config.causal:
        raise InputError("onnxruntime's GroupQueryAttention is causal, and this block is not; leave --onnx-flavor out")
    # Queries and keys are padded to the width of the values, so that is the one that counts.
    if config.value_dim % 8:
        raise InputError(
            "onnxruntime's GroupQueryAttention takes widths that are multiples of 8, and the values of this block have "
            f"{config.value_dim}; leave --onnx-flavor out"
        )
    if config.value_dim < config.head_dim:
        raise InputError(
            "onnxruntime's GroupQueryAttention takes values that are as wide as queries, and those of this block are "
            f"narrower, {config.value_dim} and {config.head_dim}; leave --onnx-flavor out"
        )


def _save(model: "onnx_ir.Model", directory: Path) -> None:
    import onnx_ir

    # The weights alone: they are known before anything is written, and a protobuf that is too large fails half-way.
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, directory / MODEL, external_data=EXTERNAL_DATA if size > _MAX_INLINE_BYTES else None)


def _export(graph: nn.Module, spec: GraphSpec, outputs: list[str], opset: int) -> "onnx_ir.Model":
    tensors, dynamic = example(spec, getattr(torch, spec.dtype))
    # At each export it warns of the operators that it skips because torchvision is not installed.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            graph,
            tensors,
            dynamo=True,
            opset_version=opset,
            input_names=list(spec.inputs),
            output_names=outputs,
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
    finally:
        logger.setLevel(level)
    if program is None:
        raise ExportError(f"torch.onnx.export gave no program at opset {opset}")
    return program.model


def _name_axes(model: "onnx_ir.Model", spec: GraphSpec) -> None:
    """Call the axes of inputs and outputs by their declared names, also those which torch names after a sum."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        tensor = spec.inputs.get(str(value.name)) or spec.outputs[str(value.name)]
        # torch names a length that is a sum `sequence_length + past_sequence_length`.
        value.shape = onnx_ir.Shape(tensor.shape)


def _strip_metadata(model: "onnx_ir.Model") -> None:
    """Remove traces of the exporting machine: stack traces hold local paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
