"""Options that a user can choose when a block is exported, and when a bundle is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from diffdeploy.bundle import BLOCK_SIZES, Activations, Quantisation, WeightBits
from diffdeploy.errors import InputError
from diffdeploy.graphs import Cache, DType, Logits, Variant

__all__ = ["Device", "ExportOptions", "RunOptions", "RuntimeName", "Selection"]

Device = Literal["cpu", "cuda"]
# The runtime of a graph: that of its format or, for ONNX, the interpreter of the onnx package or OpenVINO.
RuntimeName = Literal["native", "reference", "openvino"]
# Selection of the cases that a verification runs; see `diffdeploy.verify.sweep.select_cases`.
Selection = Literal["quick", "full"] | int

# The default of onnxruntime-genai and llama.cpp, too.
_BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options for an artifact.

    Attributes:
        format: name of a format, see `diffdeploy.formats.registry`.
        graph: variant of the graph, see `GraphSpec`.
        dtype: dtype of the graph and its weights.
        max_batch_size: largest batch the artifact is declared for.
        max_sequence_length: longest sequence the artifact is declared for; for the default, see
            `diffdeploy.exporters.settled_length`.
        device: ``cpu`` or ``cuda``, the target of formats with machine code and the device for verification; by default
            the first one that the format supports.
        opset: ONNX operator set, 18 to 24; 23 by default.
        onnx_flavor: ``standard`` for standard operators only, ``ort`` for those that onnxruntime runs fastest.
        impl: implementation of the operator in the artifact.
        seed: random seed for the inputs that the artifact is verified with.
        runtime: runtime that the artifact is verified with.
        logits: positions at which a model returns logits: ``all`` new ones, or only the ``last``.
        cache: kind of cache of a model, ``growing`` or ``in-place``, see `GraphSpec`.
        cases: selection of verification cases; the report says which parts of the declared ranges it leaves out.
        weights: bits of the numbers that matrices are quantised to; by default they are in ``dtype``.
        block_size: count of numbers that share a scale; 32 by default.
        activations: numbers to which the inputs of quantised matrices are rounded when the artifact runs: ``int8``, or
            ``float32`` for none, the default.
        quantise_head: true to quantise the head, too.
        text: file on which the quantisation loss is measured; by default a module of Python's standard library.
        max_kl: largest accepted divergence from the original model, in nats per token.
        min_agreement: smallest accepted share of tokens that remain the most probable ones.
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
    activations: Activations | None = None
    quantise_head: bool = False
    text: Path | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    @property
    def quantisation(self) -> Quantisation | None:
        """Quantisation of the matrices, or ``None``.

        Raises:
            InputError: the block size or the kind of activations is not supported.
        """
        if self.weights is None:
            return None
        size = _BLOCK_SIZE if self.block_size is None else self.block_size
        if size not in BLOCK_SIZES:
            raise InputError(f"block size is {size}; accepted: {', '.join(map(str, BLOCK_SIZES))}")
        activations = self.activations or "float32"
        if activations not in get_args(Activations):
            raise InputError(f"activations are {activations}; accepted: {', '.join(get_args(Activations))}")
        level: Literal[0, 4] = 4 if activations == "int8" else 0
        return Quantisation(weights=self.weights, block_size=size, head=self.quantise_head, accuracy_level=level)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options for running a bundle.

    Attributes:
        device: device to run on, ``cpu``, ``cuda`` or ``cuda:N``; by default the one that the bundle was made for.
        threads: number of CPU threads of the backend; by default its own choice. In torch, the number applies
            to the whole process.
        runtime: runtime that runs the graph; `onnx.reference` is slow and supports every dtype.
        recompile: true to recompile a ``compile`` bundle on a machine other than the one it was made for.
        trust: true to load a bundle that runs code when it is loaded, although this user did not export it here.
        public_key: file of the public key that the bundle's signature must match; the bundle is then trusted.
        keep_memory: false to free a call's memory on the CPU where onnxruntime would keep it for the next call.
    """

    device: str | None = None
    threads: int | None = None
    runtime: RuntimeName = "native"
    recompile: bool = False
    trust: bool = False
    public_key: str | Path | None = None
    keep_memory: bool = True
