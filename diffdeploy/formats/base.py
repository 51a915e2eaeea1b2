"""`Format`: everything that the rest of the house asks of a deployment format, as typed methods of one class."""

import os
import shutil
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
    Intermediates,
    LayerValues,
    TritonBackend,
)
from diffdeploy.formats.options import Device, ExportOptions, RunOptions, RuntimeName
from diffdeploy.graphs import DType, GraphSpec, Padding, Variant

if TYPE_CHECKING:
    from diffdeploy.modules import AnyModule

__all__ = ["EVERY_DTYPE", "Format"]

EVERY_DTYPE: tuple[DType, ...] = ("float32", "float16", "bfloat16")

# The oldest that pyproject.toml allows; none before it was tried. Programs that torch 2.13.0 exported are right in
# 2.11.0 to 2.14.1, and those of 2.11.0 and 2.14.1 in each other's; see docs/runtime-versions.md.
_LEAST_TORCH = "2.11.0"


class Format(ABC):
    """One way to ship a block. A format is added by a subclass and one row of `diffdeploy.formats.registry`.

    Attributes:
        name: the name for ``--format``.
        flavors: names of the ways in which the format can write a block down, the usual one first; empty for one way.
        impls: implementations of the operator that it can ship.
        package: import name of what runs it.
        distributions: packages that a result depends on, by the names that they are installed by.
        export_packages: import names of what an export needs beside torch.
        devices: kinds of device that it is made for.
        dtypes: dtypes of its graphs.
        runs: dtypes that its backend computes attention in, by kind of device.
        compiles: whether it makes machine code, for one kind of device, and with a C++ compiler.
        machine: which of the facts of `diffdeploy.runtime.machine.this_machine` that code depends on.
        torch_allocates: whether its memory on CUDA comes from torch's allocator, whose peak can be read.
        holds_ranges: whether the artifact itself holds the declared ranges, so that a manifest that promises more is
            found out.
        opsets: ONNX operator sets that it writes; empty where it is not ONNX.
        executes: what of a bundle runs as code when it is loaded, so that one from elsewhere has to be trusted;
            ``None`` where loading it runs nothing that the bundle brought.
        triton: how Triton runs its artifacts; ``None`` where Triton has no backend for them.
    """

    name: ClassVar[str]
    flavors: ClassVar[tuple[str, ...]] = ()
    # The two that write down two fused attentions, which contracts count.
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
    opsets: ClassVar[Sequence[int]] = ()
    executes: ClassVar[str | None] = None
    triton: ClassVar[TritonBackend | None] = None

    # What can be done here

    def why_not_export(self, device: str = "cpu", dtype: DType = "float32") -> str | None:
        """Why the format cannot be exported here for a kind of device; ``None`` when it can."""
        if reason := self.why_not_made_for(device, dtype):
            return reason
        # Looked up, not imported, which takes torch a second and more.
        if missing := [name for name in ("torch", *self.export_packages) if find_spec(name) is None]:
            return f"format {self.name} needs {' and '.join(missing)}, which is not installed"
        # As inductor chooses it, see torch._inductor.config.cpp.cxx.
        compiler = os.environ.get("CXX", "g++")
        if self.compiles and shutil.which(compiler) is None:
            return f"format {self.name} compiles C++, and {compiler} is not found; install it or set CXX"
        if self.compiles and device != "cpu":
            import torch

            if not torch.cuda.is_available():
                return f"format {self.name} compiles for the GPU of this machine, and torch finds none"
        return None

    def why_not_made_for(self, device: str, dtype: DType) -> str | None:
        """Why the format is made for no such device or dtype on any machine; ``None`` when it is."""
        if dtype not in self.dtypes:
            return f"format {self.name} has no {dtype} kernels; accepted is {' or '.join(self.dtypes)}"
        if device not in self.devices:
            return f"format {self.name} is made for {' or '.join(self.devices)}, not for {device}"
        return None

    def why_not_run(
        self, device: str = "cpu", dtype: DType = "float32", *, runtime: RuntimeName = "native"
    ) -> str | None:
        """Why bundles of the format cannot be run here; ``None`` when they can.

        Args:
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: dtype of the graph.
            runtime: that is asked for.
        """
        kind = device.partition(":")[0]
        if kind not in self.runs:
            return f"{self.name} bundles run on {' or '.join(self.runs)}, not on {kind}"
        if kind != "cpu" and (reason := _why_no_cuda(device)):
            return reason
        if find_spec(self.package) is None:
            # The extra of pyproject.toml that brings the package for such a device.
            extra = "gpu" if kind != "cpu" else "export" if self.package == "torch" else "cpu"
            return (
                f"{self.package} is not installed, and {self.name} bundles run on it; pip install 'diffdeploy[{extra}]'"
            )
        if dtype not in self.runs[kind]:
            return f"{self.package} has no {dtype} attention on {kind}"
        return None

    def least_versions(self, manifest: Manifest) -> dict[str, str]:
        """Least version of `package` that computes a bundle's artifact rightly, by its name; empty where none is known.

        Args:
            manifest: of the bundle, of which what was exported counts: config, graph and options.
        """
        return {"torch": _LEAST_TORCH} if self.package == "torch" else {}

    # Export

    @property
    def is_bound_to_device(self) -> bool:
        """Whether a bundle runs on one kind of device only."""
        return self.compiles or len(self.devices) == 1

    def device_of(self, options: ExportOptions) -> Device:
        """The kind of device that a bundle is made for: as asked for, else the format's first."""
        return options.device or self.devices[0]

    @abstractmethod
    def fastest_impl(self, options: ExportOptions, config: AnyModel) -> str:
        """The implementation that ``auto`` stands for; graphs serve all sizes. See docs/operator-speed.md.

        Args:
            options: of the export.
            config: of the block or the model.
        """

    def padding(self, variant: Variant, flavor: str | None, config: AnyModel) -> Padding:
        """What a graph makes of its mask; see `GraphSpec`."""
        return "anywhere"

    def quantises(self, flavor: str | None, graph: GraphSpec) -> bool:
        """Whether matrices of such a graph can be quantised."""
        return False

    def check_options(self, options: ExportOptions) -> None:
        """Refuse options that the format does not have.

        Raises:
            InputError: one was given.
        """
        for name, given in (
            ("opset", options.opset),
            ("onnx flavor", options.onnx_flavor),
            ("weights", options.weights),
        ):
            if given is not None:
                raise InputError(f"{name} is {given}, which format {options.format} does not have; leave it out")
        if options.runtime != "native":
            raise InputError(f"runtime {options.runtime} interprets ONNX, and format {options.format} is another")

    def engine_files(self, manifest: Manifest, directory: Path) -> Mapping[str, bytes]:
        """Files by name that engines want beside the artifact; each is what a contract expects there, byte for byte.

        Args:
            manifest: of the bundle.
            directory: of the bundle, with the files that came with the checkpoint.
        """
        return {}

    @abstractmethod
    def lower(self, block: "AnyModule", spec: GraphSpec, directory: Path, options: ExportOptions) -> Mapping[str, Any]:
        """Write the artifact of a block into a directory that holds its weights.

        Args:
            block: frozen block in the dtype of the graph, on the device that the bundle is made for.
            spec: interface of the graph.
            directory: existing directory.
            options: what the user chose.

        Returns:
            Fields of `ExportRecord` that only this format has.

        Raises:
            InputError: an option or a block that the format cannot hold.
            ExportError: the block could not be lowered.
        """

    def check_manifest(self, manifest: Manifest) -> None:
        """Refuse what no export of the format writes into a manifest.

        Raises:
            IntegrityError: it is there.
        """
        options, graph = manifest.options, manifest.graph
        for name, given, accepted in (
            ("attention_impl", options.attention_impl, self.impls),
            ("flavor", options.flavor, self.flavors or (None,)),
            ("opset", options.opset, self.opsets or (None,)),
            ("device", options.device, self.devices if self.is_bound_to_device else (None,)),
            # Instruction sets of a processor, or the GPU.
            ("made_for", set(manifest.made_for), [set(self.machine) - {"isa" if options.device == "cuda" else "gpu"}]),
            ("requires", set(manifest.requires or ()), [set(), {self.package}]),
            ("quantised weights", options.quantisation is not None, {False, self.quantises(options.flavor, graph)}),
            ("padding", graph.padding, [self.padding(graph.variant, options.flavor, manifest.config)]),
        ):
            if given not in accepted:
                said = sorted(given) if isinstance(given, set) else repr(given)
                raise IntegrityError(f"manifest.json has {name} {said}, which no export to format {self.name} writes")

    # Running

    def check_run_options(self, manifest: Manifest, options: RunOptions) -> None:
        """Refuse what the bundles of the format cannot be run with.

        Raises:
            InputError: it was asked for.
        """
        if options.runtime != "native":
            raise InputError(
                f"runtime {options.runtime} interprets standard ONNX operators, and this bundle does not have them"
            )
        if options.recompile:
            raise InputError(f"format {self.name} cannot be compiled afresh; export it again on this machine")

    @abstractmethod
    def open(self, bundle: Bundle, options: RunOptions, device: str) -> Backend:
        """Load the artifact of a bundle.

        Raises:
            ExportError: the backend cannot load it.
        """

    # Verification

    @abstractmethod
    def facts(self, bundle: Bundle) -> ArtifactFacts:
        """What the artifact says of itself. Whatever its libraries raise at a damaged artifact goes to the caller."""

    @abstractmethod
    def contract(self, bundle: Bundle, weights: Mapping[str, Array]) -> list[Check]:
        """What must hold of the artifact's structure, read from the artifact itself.

        Whatever its libraries raise at a damaged artifact goes to the caller.

        Args:
            bundle: an opened bundle.
            weights: canonical weights in the artifact's dtype.
        """

    def intermediates(self, bundle: Bundle) -> Intermediates | None:
        """The values inside; ``None`` where only outputs can be seen."""
        return None

    def layer_values(self, bundle: Bundle) -> LayerValues | None:
        """What the layers of a model give; ``None`` where only outputs can be seen."""
        return None

    # Self-test

    def read_constants(self, directory: Path, expected: Mapping[str, Array]) -> set[str]:
        """Names of those constants that the artifact holds, and that `write_constants` can change; none by default.

        Args:
            directory: directory of a right bundle.
            expected: what a right artifact can hold, see `diffdeploy.formats.expected`.
        """
        return set()

    def write_constants(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """Replace constants of the artifact.

        Args:
            directory: directory of a copy of a right bundle.
            expected: see `read_constants`.
            changes: new values of constants that `read_constants` found.
        """
        raise NotImplementedError(f"format {self.name} has no constants that can be written")

    def file_faults(self) -> Sequence[FileFault]:
        """Faults that only the files of this format can have."""
        return ()

    def traces_block(self, manifest: Manifest) -> bool:
        """Whether an export traces the block's own steps, so that one wrong step gives a wrong artifact."""
        return True


def _why_no_cuda(device: str) -> str | None:
    if find_spec("torch") is None:
        return f"device {device} needs torch to look for a GPU, and it is not installed"
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        return f"device {device} needs a GPU that torch {torch.__version__} can use, and there is none"
    if index >= torch.cuda.device_count():
        return f"device {device} does not exist; this machine has {torch.cuda.device_count()}"
    return None
