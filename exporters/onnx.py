"""Lowering to ONNX: standard operators, one attention per stream, and only nodes that depend on the input."""

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
from diffdeploy.exporters.onnx_ties import store_turned, tie_head
from diffdeploy.exporters.tracing import GraphModule, example
from diffdeploy.formats.onnx.names import EXTERNAL_DATA, MODEL, ORT, layer_output
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import AnyModule, AttentionBlock, DiffTransformer

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["lower"]

# A protobuf message is limited to 2 GiB, and readers need it twice in memory; a separate file is memory-mapped.
_MAX_INLINE_BYTES = 64 * 2**20
# Browsers, some file systems and some tools that move files take at most 2 GiB at once.
_MAX_FILE_BYTES = 2**31 - 1


def lower(
    block: AnyModule,
    spec: GraphSpec,
    directory: Path,
    *,
    opset: int,
    flavor: str,
    quantisation: Quantisation | None = None,
) -> None:
    """Write ``model.onnx`` into ``directory``; weights above 64 MiB go to files of at most 2 GiB next to it.

    Args:
        block: frozen block in the dtype of the graph.
        spec: interface of the graph.
        directory: existing directory.
        opset: operator set; from 23 on, attention is exported as ``Attention`` nodes; below 23, it is decomposed.
        flavor: ``standard`` or ``ort``.
        quantisation: quantisation of the matrices in the directory's weights file.

    Raises:
        InputError: the operators of the flavor cannot compute the block.
        ExportError: the block could not be lowered.
    """
    graph: nn.Module = GraphModule(block, spec)
    names = list(spec.outputs)
    if isinstance(block, DiffTransformer):
        graph = _WithLayers(block, spec)
        names += map(layer_output, range(block.config.num_layers))
    # Separate modules, since tracing the block determines the operators that are written.
    if flavor == ORT and isinstance(block, DiffTransformer):
        require_ort_model(block.config)
        graph = OrtModelModule(block, spec)
    elif flavor == ORT and isinstance(block, AttentionBlock):
        _require_ort(block.config)
        graph = OrtGraphModule(block, spec)
    with _scores_in_float32(), small_epsilons_kept(block, opset):
        program = _export(graph.eval(), spec, names, opset)
    # Outputs of layers were outputs of the graph only to get their names, by which the verification finds them.
    del program.graph.outputs[len(spec.outputs) :]
    if isinstance(block, DiffTransformer) and block.config.tied:
        tie_head(program, block.config.vocab_size, block.config.embed_dim)
    store_turned(program)
    if quantisation is not None:
        quantise_products(program, read_safetensors(directory / WEIGHTS), block.config, quantisation)
    _name_axes(program, spec)
    _strip_metadata(program)
    _save(program, directory)


class _WithLayers(GraphModule):
    """A model whose graph also returns the outputs of its layers."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model and collect the output of each layer."""
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
    """Trace float16 attentions in the ``with`` block as casts to float32, the attention, and a cast back.

    onnxruntime's CPU provider keeps scores in the dtype of the queries. With outliers, as in activations of language
    models, some scores exceed 65504, and infinity minus infinity is NaN, even if a mask hides that score from the
    query. The provider has no float16 matrix product either, so the casts cost nothing: both ways took 28 ms at 512
    positions of 8 heads.
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
        raise InputError("onnxruntime's GroupQueryAttention is causal, but this block is not; omit --onnx-flavor")
    # Queries and keys are padded to the width of the values, so only that width counts.
    if config.value_dim % 8:
        raise InputError(
            "onnxruntime's GroupQueryAttention needs widths that are multiples of 8, but the values of this block have "
            f"{config.value_dim}; omit --onnx-flavor"
        )
    if config.value_dim < config.head_dim:
        raise InputError(
            "onnxruntime's GroupQueryAttention needs values at least as wide as queries, but in this block values have "
            f"width {config.value_dim}, and queries {config.head_dim}; omit --onnx-flavor"
        )


def _save(model: "onnx_ir.Model", directory: Path) -> None:
    import onnx_ir

    # Estimated from the weights alone before anything is written, since writing a protobuf that is too large fails
    # midway.
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= _MAX_INLINE_BYTES:
        onnx_ir.save(model, directory / MODEL)
    else:
        # A single tensor that is larger gets a file of its own.
        onnx_ir.save(model, directory / MODEL, external_data=EXTERNAL_DATA, max_shard_size_bytes=_MAX_FILE_BYTES)


def _export(graph: nn.Module, spec: GraphSpec, outputs: list[str], opset: int) -> "onnx_ir.Model":
    tensors, dynamic = example(spec, getattr(torch, spec.dtype))
    # Every export warns about operators that it skips because torchvision is not installed.
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
        raise ExportError(f"torch.onnx.export returned no program at opset {opset}")
    return program.model


def _name_axes(model: "onnx_ir.Model", spec: GraphSpec) -> None:
    """Give the axes of inputs and outputs their declared names, including those that torch names after a sum."""
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
