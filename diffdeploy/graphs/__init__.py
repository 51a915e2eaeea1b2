"""Graphs: the interface of what is deployed, and the stages of the formula that it computes."""

from diffdeploy.graphs.run import run_graph, zero_inputs
from diffdeploy.graphs.spec import DType, GraphSpec, Logits, Range, TensorSpec, Variant, graph_spec
from diffdeploy.graphs.stages import Stage, stage_of_weight

__all__ = [
    "DType",
    "GraphSpec",
    "Logits",
    "Range",
    "Stage",
    "TensorSpec",
    "Variant",
    "graph_spec",
    "run_graph",
    "stage_of_weight",
    "zero_inputs",
]
