"""Graphs: the interface of a deployed graph, and the stages of the formula that it computes."""

from diffdeploy.graphs.padding import clear_padding
from diffdeploy.graphs.run import run_graph, zero_inputs
from diffdeploy.graphs.spec import Cache, DType, GraphSpec, Logits, Padding, Range, TensorSpec, Variant, graph_spec
from diffdeploy.graphs.stages import Stage, stage_of_weight

__all__ = [
    "Cache",
    "DType",
    "GraphSpec",
    "Logits",
    "Padding",
    "Range",
    "Stage",
    "TensorSpec",
    "Variant",
    "clear_padding",
    "graph_spec",
    "run_graph",
    "stage_of_weight",
    "zero_inputs",
]
