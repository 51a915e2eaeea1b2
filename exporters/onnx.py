"""Lowering to ONNX: standard operators, two attentions per layer, nothing that does not depend on the input."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffdeploy.errors import ExportError
from diffdeploy.graphs import GraphSpec
from diffdeploy.modules import DiffAttention

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["MODEL", "lower"]

MODEL = "model.onnx"


def lower(block: DiffAttention, spec: GraphSpec, directory: Path, *, opset: int = 23) -> Path:
    """Write ``model.onnx`` into ``directory``.

    Args:
        block: frozen block in the dtype of the graph.
        spec: interface of the graph.
        directory: existing directory.
        opset: ONNX operator set; from 23 on the attentions are ``Attention`` nodes, below they are decomposed.

    Returns:
        Path of the file.

    Raises:
        ExportError: the block could not be lowered.
    """
    import onnx_ir

    axes = {name: torch.export.Dim(name, min=bounds.min, max=bounds.max) for name, bounds in spec.axes.items()}
    shape = spec.inputs["hidden_states"].shape
    # Sizes of 0 and 1 would be taken for constants; 1 is proved by the verification.
    example_sizes = {"batch_size": min(3, spec.axes["batch_size"].max), "sequence_length": 2}
    sizes = [axis if isinstance(axis, int) else example_sizes[axis] for axis in shape]
    example = torch.zeros(sizes, dtype=block.q_proj.weight.dtype)
    dynamic = {index: axes[axis] for index, axis in enumerate(shape) if isinstance(axis, str)}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                block,
                (),
                kwargs={"hidden_states": example},
                dynamo=True,
                opset_version=opset,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes={"hidden_states": dynamic},
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ExportError(f"torch.onnx.export failed at opset {opset}: {reason}") from error
    finally:
        logger.setLevel(level)
    if program is None:
        raise ExportError(f"torch.onnx.export gave no program at opset {opset}")
    _strip_metadata(program.model)
    path = directory / MODEL
    onnx_ir.save(program.model, path)
    return path


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
