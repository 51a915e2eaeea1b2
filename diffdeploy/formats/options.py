"""What a user can choose when a block is exported, and when a bundle is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffdeploy.bundle import BLOCK_SIZES, Quantisation, WeightBits
from diffdeploy.errors import InputError
from diffdeploy.graphs import Cache, DType, Logits, Variant

__all__ = ["Device", "ExportOptions", "RunOptions", "RuntimeName", "Selection"]

Device = Literal["cpu", "cuda"]
# What runs a graph: the runtime of its format; or, of ONNX, the interpreter of the package onnx, or OpenVINO.
RuntimeName = Literal["native", "reference", "openvino"]
# Of the cases that a verification runs; see `diffdeploy.verify.sweep.select_cases`.
Selection = Literal["quick", "full"] | int

# What onnxruntime-genai and llama.cpp take, too.
_BLOCK_SIZE = 32


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
        cache: of a model: ``growing``, or ``in-place``, see `GraphSpec`.
        cases: what it is verified on; the report says which parts of the declared ranges that leaves out.
        weights: bits of the numbers that matrices are quantised to; by default they are in ``dtype``.
        block_size: numbers that share a scale; by default 32.
        quantise_head: quantise the head, too.
        text: file that the loss by the quantisation is measured on; by default a module of Python's standard library.
        max_kl: the most that the divergence from the original may be, in nats a token.
        min_agreement: the least share of tokens that must stay the most probable ones.
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
    cache: Cache = "growing"
    cases: Selection = "full"
    weights: WeightBits | None = None
    block_size: int | None = None
    quantise_head: bool = False
    text: Path | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def quantisation(self) -> Quantisation | None:
        """How matrices are quantised, if they are.

        Raises:
            InputError: there are no blocks of that size.
        """
        if self.weights is None:
            return None
        size = _BLOCK_SIZE if self.block_size is None else self.block_size
        if size not in BLOCK_SIZES:
            raise InputError(f"block size is {size}; accepted: {', '.join(map(str, BLOCK_SIZES))}")
        return Quantisation(weights=self.weights, block_size=size, head=self.quantise_head)


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
