"""ONNX: standard operators for every ONNX runtime, or flavor ``ort`` for onnxruntime."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import AnyModel
from diffdeploy.errors import ExportError, InputError
from diffdeploy.formats.artifact import (
    ArtifactFacts,
    Backend,
    Check,
    FileFault,
    GraphNode,
    Intermediates,
    LayerValues,
    ProductValues,
    TritonBackend,
)
from diffdeploy.formats.base import EVERY_DTYPE, Format
from diffdeploy.formats.onnx.names import FIRST_OPSET_WITH_ATTENTION, MODEL, ORT, STANDARD
from diffdeploy.formats.onnx.versions import least_onnxruntime
from diffdeploy.formats.options import ExportOptions, RunOptions, RuntimeName
from diffdeploy.graphs import DType, GraphSpec, Padding, Variant
from diffdeploy.versions import installed_versions, release

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["DEFAULT_OPSET", "OPSETS", "OnnxFormat"]

# torch's exporter supports 18 and above; 24 is the last opset that this library is tested with.
OPSETS = range(18, 25)
# The first opset with Attention; for earlier ones, attentions are decomposed into products and a softmax.
DEFAULT_OPSET = FIRST_OPSET_WITH_ATTENTION

# In earlier versions of onnx, the reference implementation of MatMul rejected its own bfloat16 results.
_REFERENCE_MULTIPLIES_BFLOAT16 = (1, 23)


class OnnxFormat(Format):
    """A bundle with ``model.onnx``, which contains its weights or reads them from a file next to it."""

    name = "onnx"
    flavors = (STANDARD, ORT)
    opsets = OPSETS
    package = "onnxruntime"
    distributions = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino")
    export_packages = ("onnx", "onnxscript")
    # onnxruntime 1.32 cannot compute attention in bfloat16 on the CPU.
    runs: ClassVar[Mapping[str, tuple[DType, ...]]] = {"cpu": ("float32", "float16"), "cuda": EVERY_DTYPE}
    # onnxruntime has its own allocator.
    torch_allocates = False
    holds_ranges = True
    triton = TritonBackend(platform="onnxruntime_onnx", backend="onnxruntime", files=(MODEL, "model*.onnx.data"))

    def why_not_run(
        self, device: str = "cpu", dtype: DType = "float32", *, runtime: RuntimeName = "native"
    ) -> str | None:
        """See `Format.why_not_run`."""
        if runtime == "reference":
            return _why_no_reference(device, dtype)
        if runtime == "openvino":
            return _why_no_openvino(device, dtype)
        if (reason := super().why_not_run(device, dtype)) is not None:
            wrong_dtype = dtype not in self.runs.get(device.partition(":")[0], EVERY_DTYPE)
            return reason + ("; --runtime reference verifies such graphs, slowly" if wrong_dtype else "")
        return _why_no_provider() if device != "cpu" else None

    def least_versions(self, manifest: Manifest) -> dict[str, str]:
        """See `Format.least_versions`."""
        return {self.package: least_onnxruntime(manifest)}

    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """See `Format.fastest_impl`."""
        # `padded` reads the paired cache in place. Without a cache, Attention supports values that are wider than keys,
        # so no padding is needed, which is faster: 310 ms compared with 423 ms for a block with D 512 and h 4 at
        # 2 x 2,048 positions.
        return "padded" if options.graph in ("cached", "model") else "two_call"

    def padding(self, variant: Variant, flavor: str | None, config: AnyModel) -> Padding:
        """See `Format.padding`: onnxruntime's operator counts tokens, and a window slides over the counted tokens."""
        if flavor != ORT or variant != "model":
            return "anywhere"
        return "contiguous" if any(block.sliding_window for block in config.blocks.values()) else "counted"

    def quantises(self, flavor: str | None, graph: GraphSpec) -> bool:
        """See `Format.quantises`: onnxruntime's operator multiplies by such matrices, with results in float32."""
        return flavor == ORT and graph.variant == "model" and graph.dtype == "float32"

    def check_options(self, options: ExportOptions) -> None:
        """Reject an opset outside 18 to 24, and options that the operators of a flavor do not support.

        Raises:
            InputError: such an option was given.
        """
        if options.onnx_flavor is not None and options.onnx_flavor not in self.flavors:
            raise InputError(f"onnx flavor is {options.onnx_flavor!r}; accepted: {', '.join(self.flavors)}")
        if options.onnx_flavor == ORT and options.graph == "cached":
            raise InputError("graph is cached, which the flavor ort does not have; omit --onnx-flavor")
        if options.onnx_flavor == ORT and options.runtime != "native":
            raise InputError(f"runtime {options.runtime} supports only standard operators; omit --onnx-flavor")
        if options.weights is not None:
            _check_quantisation(options)
        if options.opset is not None and options.opset not in OPSETS:
            raise InputError(f"opset is {options.opset}; accepted: {OPSETS.start} to {OPSETS.stop - 1}")

    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """See `Format.lower`."""
        from diffdeploy.exporters.onnx import lower

        flavor, opset = options.onnx_flavor or STANDARD, options.opset or DEFAULT_OPSET
        quantisation = options.quantisation
        lower(block, spec, directory, opset=opset, flavor=flavor, quantisation=quantisation)
        return {"opset": opset, "flavor": flavor, "quantisation": quantisation}

    def engine_files(self, manifest: Manifest, directory: Path) -> Mapping[str, bytes]:
        """See `Format.engine_files`: onnxruntime-genai's config."""
        from diffdeploy.formats.onnx.genai import GENAI_CONFIG, genai_config

        content = genai_config(manifest, directory)
        return {} if content is None else {GENAI_CONFIG: content}

    def check_run_options(self, manifest: Manifest, options: RunOptions) -> None:
        """See `Format.check_run_options`."""
        standard = manifest.options.flavor != ORT
        super().check_run_options(
            manifest, RunOptions(runtime="native" if standard else options.runtime, recompile=options.recompile)
        )

    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """See `Format.open`."""
        from diffdeploy.formats.onnx.backend import OnnxCudaBackend, OnnxReferenceBackend, OnnxRuntimeBackend
        from diffdeploy.formats.onnx.external import require_own_data
        from diffdeploy.formats.onnx.openvino import OpenVinoBackend

        try:
            require_own_data(bundle.path)
        except (ValueError, OSError) as error:
            raise ExportError(f"{MODEL} in {bundle.path} is not an ONNX model: {error}") from error
        if options.runtime == "reference":
            return OnnxReferenceBackend(bundle, options, device)
        if options.runtime == "openvino":
            return OpenVinoBackend(bundle, options, device)
        kind = OnnxRuntimeBackend if device == "cpu" else OnnxCudaBackend
        return kind(bundle, options, device)

    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """See `Format.facts`."""
        from diffdeploy.formats.onnx.contract import facts

        return facts(bundle)

    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """See `Format.contract`."""
        from diffdeploy.formats.onnx.contract import checks

        return checks(bundle, weights)

    def intermediates(self, bundle: Bundle) -> Intermediates:
        """See `Format.intermediates`."""
        from diffdeploy.formats.onnx.intermediates import intermediates

        return intermediates(bundle.path)

    def nodes(self, bundle: Bundle) -> Sequence[GraphNode]:
        """See `Format.nodes`."""
        from diffdeploy.formats.onnx.nodes import nodes

        return nodes(bundle.path)

    def layer_values(self, bundle: Bundle) -> LayerValues:
        """See `Format.layer_values`."""
        from diffdeploy.formats.onnx.intermediates import layer_values

        return layer_values(bundle.path, len(bundle.manifest.config.blocks), list(bundle.manifest.graph.outputs))

    def product_values(self, bundle: Bundle) -> ProductValues:
        """See `Format.product_values`."""
        from diffdeploy.formats.onnx.nbits_values import product_values

        return product_values(bundle.path)

    def with_float_activations(self, bundle: Bundle) -> Mapping[str, bytes]:
        """See `Format.with_float_activations`."""
        from diffdeploy.formats.onnx.nbits_values import with_float_activations

        return {MODEL: with_float_activations(bundle.path)}

    def read_constants(self, directory: Path, expected: Mapping[str, Array]) -> set[str]:
        """See `Format.read_constants`."""
        from diffdeploy.formats.onnx.constants import read

        return read(directory, expected)

    def write_constants(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """See `Format.write_constants`."""
        from diffdeploy.formats.onnx.constants import write

        write(directory, expected, changes)

    def file_faults(self) -> Sequence[FileFault]:
        """See `Format.file_faults`."""
        from diffdeploy.formats.onnx.faults import ONNX_FAULTS

        return ONNX_FAULTS

    def traces_block(self, manifest: Manifest) -> bool:
        """See `Format.traces_block`: the flavor ``ort`` writes the block's steps itself."""
        return manifest.options.flavor != ORT


def _why_no_openvino(device: str, dtype: DType) -> str | None:
    if device != "cpu":
        return f"OpenVINO bundles run on cpu, not on {device.partition(':')[0]}"
    if find_spec("openvino") is None:
        return "openvino is not installed; pip install 'diffdeploy[openvino]'"
    return "numpy cannot pass bfloat16 to OpenVINO" if dtype == "bfloat16" else None


def _check_quantisation(options: ExportOptions) -> None:
    if options.graph != "model":
        raise InputError(f"weights are {options.weights}, which only whole models have; omit --layer or --weights")
    if options.onnx_flavor != ORT:
        raise InputError(
            f"weights are {options.weights}, which need an operator of onnxruntime; give --onnx-flavor {ORT}"
        )
    if options.dtype != "float32":
        raise InputError(
            f"weights are {options.weights} and dtype is {options.dtype}; omit --dtype: quantised weights need float32"
        )
    _ = options.quantisation  # raises for an invalid block size


def _why_no_reference(device: str, dtype: DType) -> str | None:
    if device != "cpu":
        return f"the reference runtime runs on cpu, not on {device.partition(':')[0]}"
    if find_spec("onnx") is None:
        return "the reference runtime needs onnx, which is not installed; pip install 'diffdeploy[export]'"
    found = installed_versions(["onnx"])["onnx"]
    if dtype == "bfloat16" and release(found) < _REFERENCE_MULTIPLIES_BFLOAT16:
        return f"onnx {found} cannot multiply matrices in bfloat16; pip install 'onnx>=1.23'"
    return None


def _why_no_provider() -> str | None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} has no CUDA provider; pip install 'diffdeploy[gpu]'"
