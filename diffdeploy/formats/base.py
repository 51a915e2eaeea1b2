"""`Format`: everything that other code asks of a deployment format, as typed methods of one class."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Manifest
from diffdeploy.config import AnyModel
from diffdeploy.errors import InputError, IntegrityError
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
from diffdeploy.formats.options import Device, ExportOptions, RunOptions, RuntimeName
from diffdeploy.graphs import Cache, DType, GraphSpec, Padding, Variant
from diffdeploy.toolchain import why_not_compile

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["EVERY_DTYPE", "Format"]

EVERY_DTYPE: tuple[DType, ...] = ("float32", "float16", "bfloat16")

# The oldest version that pyproject.toml allows; earlier ones were not tested. Programs exported by torch 2.13.0 are
# correct in 2.11.0 to 2.14.1. Programs exported by 2.11.0 are correct in 2.14.1, and vice versa. See
# docs/runtime-versions.md.
_LEAST_TORCH = "2.11.0"


class Format(ABC):
    """One way to ship a block. A format is added by a subclass and one row of `diffdeploy.formats.registry`.

    Attributes:
        name: name for ``--format``.
        flavors: names of the variants in which the format can write a block, the default first; empty if there are no
            variants.
        impls: implementations of the operator that it can ship.
        package: import name of the package that runs it.
        distributions: names of the distributions that a result depends on.
        export_packages: import names of the packages that an export needs in addition to torch.
        devices: kinds of device that the format supports.
        dtypes: dtypes of its graphs.
        runs: dtypes in which its backend computes attention, by kind of device.
        compiles: true if it compiles machine code, with a C++ compiler, for one kind of device.
        machine: names of the facts of `diffdeploy.runtime.machine.this_machine` that its artifacts depend on.
        torch_allocates: true if its memory on CUDA comes from torch's allocator, whose peak can be measured.
        holds_ranges: true if the artifact itself contains the declared ranges, so that a manifest that promises more is
            detected.
        caches: kinds of caches that graphs of models can have, see `GraphSpec`.
        opsets: ONNX operator sets that it writes; empty for other formats.
        executes: description of the parts of a bundle that run as code when it is loaded; the user must then
            trust bundles that somebody else exported. ``None`` if loading runs no code from the bundle.
        triton: settings for Triton; ``None`` if Triton has no backend for its artifacts.
    """

    name: ClassVar[str]
    flavors: ClassVar[tuple[str, ...]] = ()
    # Each of these implementations results in two fused attentions, which contracts count.
    impls: ClassVar[tuple[str, ...]] = ("two_call", "padded")
    package: ClassVar[str] = "torch"
    distributions: ClassVar[tuple[str, ...]] = ()
    export_packages: ClassVar[tuple[str, ...]] = ()
    devices: ClassVar[tuple[Device, ...]] = ("cpu", "cuda")
    dtypes: ClassVar[tuple[DType, ...]] = EVERY_DTYPE
    runs: ClassVar[Mapping[str, tuple[DType, ...]]] = {"cpu": EVERY_DTYPE, "cuda": EVERY_DTYPE}
    compiles: ClassVar[bool] = False
    machine: ClassVar[tuple[str, ...]] = ()
    torch_allocates: ClassVar[bool] = True
    holds_ranges: ClassVar[bool] = False
    caches: ClassVar[tuple[Cache, ...]] = ("growing",)
    opsets: ClassVar[Sequence[int]] = ()
    executes: ClassVar[str | None] = None
    triton: ClassVar[TritonBackend | None] = None

    # Support on this machine

    def why_not_export(self, device: str = "cpu", dtype: DType = "float32") -> str | None:
        """Reason why the format cannot be exported here for a kind of device; ``None`` if it can."""
        if reason := self.why_not_made_for(device, dtype):
            return reason
        # Looked up but not imported, since importing torch takes a second or more.
        if missing := [name for name in ("torch", *self.export_packages) if find_spec(name) is None]:
            verb = "is" if len(missing) == 1 else "are"
            return f"format {self.name} needs {' and '.join(missing)}, which {verb} not installed"
        if self.compiles and (reason := why_not_compile()):
            return f"format {self.name} {reason}"
        if self.compiles and device != "cpu":
            import torch

            if not torch.cuda.is_available():
                return f"format {self.name} compiles for the GPU of this machine, but torch finds none"
        return None

    def why_not_made_for(self, device: str, dtype: DType) -> str | None:
        """Reason why the format does not support a device or dtype on any machine; ``None`` if it does."""
        if dtype not in self.dtypes:
            return f"format {self.name} has no {dtype} kernels; accepted: {' or '.join(self.dtypes)}"
        if device not in self.devices:
            return f"format {self.name} is made for {' or '.join(self.devices)}, not for {device}"
        return None

    def why_not_run(
        self, device: str = "cpu", dtype: DType = "float32", *, runtime: RuntimeName = "native"
    ) -> str | None:
        """Reason why bundles of the format cannot be run here; ``None`` if they can.

        Args:
            device: device to run on, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: dtype of the graph.
            runtime: requested runtime.
        """
        kind = device.partition(":")[0]
        if kind not in self.runs:
            return f"{self.name} bundles run on {' or '.join(self.runs)}, not on {kind}"
        if kind != "cpu" and (reason := _why_no_cuda(device)):
            return reason
        if find_spec(self.package) is None:
            # The extra in pyproject.toml that installs the package for this kind of device.
            extra = "gpu" if kind != "cpu" else "export" if self.package == "torch" else "cpu"
            return f"{self.name} bundles need {self.package}, which is not installed; pip install 'diffdeploy[{extra}]'"
        if dtype not in self.runs[kind]:
            return f"{self.package} has no {dtype} attention on {kind}"
        return None

    def least_versions(self, manifest: Manifest) -> dict[str, str]:
        """Oldest version of `package` that computes a bundle's artifact correctly, by package; empty if none is known.

        Args:
            manifest: manifest of the bundle, whose config, graph and options are relevant.
        """
        return {"torch": _LEAST_TORCH} if self.package == "torch" else {}

    # Export

    @property
    def is_bound_to_device(self) -> bool:
        """True if a bundle runs on one kind of device only."""
        return self.compiles or len(self.devices) == 1

    def device_of(self, options: ExportOptions) -> Device:
        """Kind of device that a bundle is made for: the requested one, or the format's first."""
        return options.device or self.devices[0]

    @abstractmethod
    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """Implementation that ``auto`` selects for a graph, which must serve all sizes. See docs/operator-speed.md.

        Args:
            options: options of the export.
            config: config of the block or the model.
        """

    def padding(self, variant: Variant, flavor: str | None, config: AnyModel) -> Padding:
        """Kind of padding that a graph supports; see `GraphSpec`."""
        return "anywhere"

    def quantises(self, flavor: str | None, graph: GraphSpec) -> bool:
        """True if the matrices of such a graph can be quantised."""
        return False

    def check_options(self, options: ExportOptions) -> None:
        """Reject options that the format does not have.

        Raises:
            InputError: such an option was given.
        """
        for name, given in (
            ("opset", options.opset),
            ("onnx flavor", options.onnx_flavor),
            ("weights", options.weights),
        ):
            if given is not None:
                raise InputError(f"{name} is {given}, which format {options.format} does not have; omit it")
        if options.runtime != "native":
            raise InputError(f"runtime {options.runtime} runs only ONNX, but the format is {options.format}")

    def engine_files(self, manifest: Manifest, directory: Path) -> Mapping[str, bytes]:
        """Names and contents of the files that engines need next to the artifact; contracts compare every byte.

        Args:
            manifest: manifest of the bundle.
            directory: directory of the bundle, with the files that came with the checkpoint.
        """
        return {}

    @abstractmethod
    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """Write the artifact of a block into a directory that contains its weights.

        Args:
            block: frozen block in the dtype of the graph, on the device that the bundle is made for.
            spec: interface of the graph.
            directory: existing directory.
            options: options that the user chose.

        Returns:
            Fields of `ExportRecord` that only this format has.

        Raises:
            InputError: the format does not support an option or the block.
            ExportError: the block could not be lowered.
        """

    def check_manifest(self, manifest: Manifest) -> None:
        """Reject manifests that no export of the format writes.

        Raises:
            IntegrityError: the manifest has an entry that no export writes.
        """
        options, graph = manifest.options, manifest.graph
        for name, given, accepted in (
            ("attention_impl", options.attention_impl, self.impls),
            ("flavor", options.flavor, self.flavors or (None,)),
            ("opset", options.opset, self.opsets or (None,)),
            ("device", options.device, self.devices if self.is_bound_to_device else (None,)),
            # Instruction sets of a processor, or the name of the GPU.
            ("made_for", set(manifest.made_for), [set(self.machine) - {"isa" if options.device == "cuda" else "gpu"}]),
            ("requires", set(manifest.requires or ()), [set(), {self.package}]),
            ("quantised weights", options.quantisation is not None, {False, self.quantises(options.flavor, graph)}),
            ("cache", graph.cache, self.caches),
            ("padding", graph.padding, [self.padding(graph.variant, options.flavor, manifest.config)]),
        ):
            if given not in accepted:
                said = sorted(given) if isinstance(given, set) else repr(given)
                raise IntegrityError(f"manifest.json has {name} {said}, which no export to format {self.name} writes")

    # Running

    def check_run_options(self, manifest: Manifest, options: RunOptions) -> None:
        """Reject options with which the bundles of the format cannot be run.

        Raises:
            InputError: such an option was given.
        """
        if options.runtime != "native":
            raise InputError(
                f"runtime {options.runtime} runs only standard ONNX operators, which this bundle does not have"
            )
        if options.recompile:
            raise InputError(f"format {self.name} cannot be recompiled; export it again on this machine")

    @abstractmethod
    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """Load the artifact of a bundle.

        Raises:
            ExportError: the backend cannot load it.
        """

    # Verification

    @abstractmethod
    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """Read the artifact's description of itself.

        Errors that libraries raise for damaged artifacts are not caught.
        """

    @abstractmethod
    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """Check the artifact's structure, read from the artifact itself.

        Errors that libraries raise for damaged artifacts are not caught.

        Args:
            bundle: an opened bundle.
            weights: canonical weights in the artifact's dtype.
        """

    def intermediates(self, bundle: Bundle) -> Intermediates | None:
        """Intermediate values of the artifact; ``None`` if only outputs can be observed."""
        return None

    def layer_values(self, bundle: Bundle) -> LayerValues | None:
        """Function that computes the outputs of a model's layers; ``None`` if only outputs can be observed."""
        return None

    def product_values(self, bundle: Bundle) -> ProductValues:
        """Function that computes the products with the quantised matrices of a model."""
        raise NotImplementedError(f"format {self.name} has no quantised matrices")

    def with_float_activations(self, bundle: Bundle) -> Mapping[str, bytes]:
        """Files of the same artifact without quantised activations, where they differ, by name."""
        raise NotImplementedError(f"format {self.name} has no quantised activations")

    def nodes(self, bundle: Bundle) -> Sequence[GraphNode] | None:
        """The nodes of the artifact's graph, in order; ``None`` if there is no graph to read."""
        return None

    # Self-test

    def read_constants(self, directory: Path, expected: Mapping[str, Array]) -> set[str]:
        """Names of the expected constants that the artifact contains and `write_constants` can change; none by default.

        Args:
            directory: directory of a correct bundle.
            expected: constants that a correct artifact may contain, see `diffdeploy.formats.expected`.
        """
        return set()

    def write_constants(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """Replace constants of the artifact.

        Args:
            directory: directory of a copy of a correct bundle.
            expected: see `read_constants`.
            changes: new values of constants that `read_constants` found.
        """
        raise NotImplementedError(f"format {self.name} has no constants that can be written")

    def file_faults(self) -> Sequence[FileFault]:
        """Faults that only the files of this format can have."""
        return ()

    def traces_block(self, manifest: Manifest) -> bool:
        """True if an export traces the block's own steps, so that one wrong step results in a wrong artifact."""
        return True


def _why_no_cuda(device: str) -> str | None:
    if find_spec("torch") is None:
        return f"device {device} needs torch to find a GPU, but torch is not installed"
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        return f"device {device} needs a GPU that torch {torch.__version__} can use, but there is none"
    if index >= torch.cuda.device_count():
        return f"device {device} does not exist; the number of GPUs on this machine is {torch.cuda.device_count()}"
    return None
