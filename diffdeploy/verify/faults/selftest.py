"""Proof that the verification can fail: every fault that a bundle could have is put into a copy, and verified."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.bundle import MANIFEST, WEIGHTS, Bundle, Manifest, open_bundle, write_manifest
from diffdeploy.digests import file_sha256
from diffdeploy.errors import DiffDeployError, ExportError, VerificationError
from diffdeploy.runtime import RunOptions
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.faults.artifact import LocalArtifact
from diffdeploy.verify.faults.base import Fault, Lower, Subject
from diffdeploy.verify.faults.results import FaultResult, SelfTest, Skipped
from diffdeploy.verify.faults.table import faults_of
from diffdeploy.verify.faults.writing import read_constants
from diffdeploy.verify.metrics import Yardstick
from diffdeploy.verify.reference import Reference
from diffdeploy.verify.run import verify_bundle

__all__ = ["Trials", "self_test"]


class _Remembered(Reference):
    """A reference that knows the cases that it has met: they are the same for every fault."""

    def __init__(self, bundle: Bundle, exact_weights: Mapping[str, Array]) -> None:
        super().__init__(bundle, exact_weights)
        self._known: dict[str, dict[str, Yardstick]] = {}

    def yardsticks(self, case: AnyCase, inputs: Mapping[str, Array]) -> dict[str, Yardstick]:
        if case.id not in self._known:
            self._known[case.id] = super().yardsticks(case, inputs)
        return self._known[case.id]


class Trials:
    """Trials of faults on copies of one right bundle, which is never changed.

    Args:
        path: the bundle's directory.
        lower: exports a wrong block as the bundle's was; without it, faults in the block are not put in.
        run_options: device and backend that artifacts are run with.

    Attributes:
        faults: those that the bundle could have, and that can be put in.
        without_export: those in the block, where there is no ``lower``.

    Raises:
        InputError: no bundle there.
        IntegrityError: the bundle is not what was exported.
        UnavailableError: this machine cannot run the format.
        VerificationError: the bundle fails verification as it is, so that nothing could be proved with it.
    """

    def __init__(self, path: str | Path, lower: Lower | None = None, run_options: RunOptions | None = None) -> None:
        bundle = open_bundle(path)
        weights = read_safetensors(bundle.path / WEIGHTS)
        constants = read_constants(bundle.path, bundle.manifest, weights)
        self._subject = Subject(bundle.path, bundle.manifest, constants, weights, lower)
        self._options = run_options or RunOptions()
        exact = {name: array.astype(np.float64) for name, array in weights.items()}
        self._reference = _Remembered(bundle, exact)
        self._digests = _digests(bundle.path)
        report = verify_bundle(path, run_options=self._options, open_artifact=LocalArtifact, reference=self._reference)
        if not report.passed:
            raise VerificationError(
                f"{path} fails verification without any fault put in, so a self-test proves nothing: "
                f"{report.first_failure()}"
            )
        self.faults = faults_of(self._subject)
        exportable = faults_of(replace(self._subject, lower=lower or _refuse))
        self.without_export = [fault for fault in exportable if fault not in self.faults]

    def run(self, fault: Fault) -> FaultResult:
        """Put one fault into a copy and verify it.

        Raises:
            ExportError: the fault could not be put in.
        """
        with tempfile.TemporaryDirectory(prefix="diffdeploy-fault-") as folder:
            copy = Path(folder) / "bundle"
            shutil.copytree(self._subject.path, copy)
            self._inject(fault, replace(self._subject, path=copy))
            return self._verify(fault, copy)

    def _inject(self, fault: Fault, subject: Subject) -> None:
        try:
            fault.inject(subject)
        except DiffDeployError as error:  # a format that does not have what the faulty block needs
            raise ExportError(str(error)) from error
        if fault.signed:
            manifest = Manifest.from_bytes((subject.path / MANIFEST).read_bytes())
            write_manifest(subject.path, manifest)
        if fault.wrap is None and _digests(subject.path) == self._digests:
            raise ExportError(f"the fault {fault.name} does not change the artifact")

    def _verify(self, fault: Fault, copy: Path) -> FaultResult:
        # What is right is another thing where config, graph or weights are, and has to be computed for every case.
        same = self._is_held_against_the_same(copy)
        try:
            report = verify_bundle(
                copy,
                cases="full" if same else "quick",
                run_options=self._options,
                open_artifact=partial(LocalArtifact, wrap=fault.wrap),
                reference=self._reference if same else None,
                first_failure_only=True,
            )
        except DiffDeployError as error:
            return FaultResult.refused(fault, str(error))
        return FaultResult.of(fault, report)

    def _is_held_against_the_same(self, copy: Path) -> bool:
        manifest = Manifest.from_bytes((copy / MANIFEST).read_bytes())
        promised = (manifest.config, manifest.graph) == (self._subject.config, self._subject.spec)
        weights = copy / WEIGHTS
        return promised and weights.exists() and file_sha256(weights) == self._digests[WEIGHTS]


def self_test(
    path: str | Path,
    *,
    lower: Lower | None = None,
    why_no_lower: str = "there is no exporter",
    run_options: RunOptions | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> SelfTest:
    """Put every fault that a bundle could have into copies of it, one at a time, and verify each.

    Args:
        path: the bundle's directory; it is not changed.
        lower: see `Trials`.
        why_no_lower: said of the faults that are not put in without it.
        run_options: see `Trials`.
        progress: called with faults done, faults in all, and the name of the next one.

    Raises:
        DiffDeployError: see `Trials`.
    """
    trials = Trials(path, lower, run_options)
    results: list[FaultResult] = []
    skipped = [Skipped(name=fault.name, reason=why_no_lower) for fault in trials.without_export]
    for done, fault in enumerate(trials.faults):
        progress(done, len(trials.faults), fault.name)
        try:
            results.append(trials.run(fault))
        except ExportError as error:
            skipped.append(Skipped(name=fault.name, reason=str(error)))
    return SelfTest.of(results, skipped)


def _refuse(*_: object) -> None:
    raise ExportError("there is no exporter")


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file_sha256(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }
