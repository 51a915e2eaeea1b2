"""What a user can choose when a block is exported, and when a bundle is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffdeploy.graphs import DType, Logits, Variant

__all__ = ["Device", "ExportOptions", "RunOptions", "RuntimeName", "Selection"]

Device = Literal["cpu", "cuda"]
# What runs a graph: the runtime of its format; or, of ONNX, the interpreter of the package onnx, or OpenVINO.
RuntimeName = Literal["native", "reference", "openvino"]
# Of the cases that a verification runs; see `diffdeploy.verify.sweep.select_cases`.
Selection = Literal["quick", "full"] | int


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the user can choose about the artifact.

    Attributes:
        format: name of a format, see `diffdeploy.formats.registry`.
        graph: variant of the graph, see `GraphSpec`.
        dtype: dtype of the graph and its weights.
        max_batch_size: largest batch the artifact is declared for.
        max_sequence_length: longest sequence the artifact is declared for; by default see
            `diffdeploy.exporters.settled_length`.
        device: ``cpu`` or ``cuda``: what the formats with machine code are compiled for, and where the artifact is
            verified; by default the first that the format is made for.
        opset: ONNX operator set, 18 to 24; by default 23.
        onnx_flavor: ``standard`` for operators of the standard alone; ``ort`` for those that onnxruntime runs fastest.
        impl: how the two attentions are written down.
        seed: random seed for the inputs that the artifact is verified with.
        runtime: that the artifact is verified with.
        logits: of a model: at ``all`` new positions, or at the ``last`` alone.
        cases: what it is verified on; the report says which parts of the declared ranges that leaves out.
    """

    format: str = "onnx"
    graph: Variant = "plain"
    dtype: DType = "float32"
    max_batch_size: int = 32
    max_sequence_length: int | None = None
    device: Device | None = None
    opset: int | None = None
    onnx_flavor: str | None = None
    impl: str = "auto"
    seed: int = 0
    runtime: RuntimeName = "native"
    logits: Logits = "all"
    cases: Selection = "full"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a bundle is run with.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default the one that the bundle was made for.
        threads: threads of the backend on the CPU; by default its own choice. Those of torch are the whole process's.
        runtime: what runs it; `onnx.reference` is slow and knows every dtype.
        recompile: compile a ``compile`` bundle afresh, on a machine other than the one that it was made for.
        trust: load a bundle that runs code when it is loaded, although no export of this user made it here.
        public_key: file of the key that must have signed the bundle, which is trusted then.
    """

    device: str | None = None
    threads: int | None = None
    runtime: RuntimeName = "native"
    recompile: bool = False
    trust: bool = False
    public_key: str | Path | None = None
