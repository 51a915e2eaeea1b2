"""Proof that the verification can fail: every fault that a bundle could have is put into a copy, which is verified."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from diffdeploy.bundle import MANIFEST, WEIGHTS, Manifest, open_bundle, read_weights, write_manifest
from diffdeploy.errors import DiffDeployError, ExportError, VerificationError
from diffdeploy.files import file_sha256
from diffdeploy.formats import ExportOptions, RunOptions, Selection
from diffdeploy.formats.expected import held_constants
from diffdeploy.selftest.fault import Fault, FaultTarget
from diffdeploy.selftest.local_artifact import LocalArtifact
from diffdeploy.selftest.registry import faults_of
from diffdeploy.selftest.results import FaultResult, SelfTest, Skipped
from diffdeploy.verify.run import verify_bundle
from diffdeploy.verify.yardsticks import RememberedYardsticks

__all__ = ["Trials", "self_test"]


class Trials:
    """Trials of faults on copies of one correct bundle, which is never changed.

    Args:
        path: directory of the bundle.
        run_options: device and backend that artifacts are run with, and the key that must have signed the bundle.

    Attributes:
        faults: faults that the bundle could have, and that can be introduced.
        skipped: faults that it could have, but that cannot be introduced, with the reason.

    Raises:
        InputError: there is no bundle.
        IntegrityError: the bundle is not what was exported or signed.
        UnavailableError: this machine cannot run the format.
        VerificationError: the bundle fails verification without a fault, so that nothing could be proved with it.
    """

    def __init__(self, path: str | Path, run_options: RunOptions | None = None) -> None:
        self._options = run_options or RunOptions()
        bundle = open_bundle(path, self._options.public_key)
        weights = read_weights(bundle)
        self._target = FaultTarget(bundle.path, bundle.manifest, held_constants(bundle, weights), weights)
        is_block = self._target.decoder is None
        # The weights of a model are read one layer at a time when the formula needs them.
        exact = {name: array.astype(np.float64) if is_block else array for name, array in weights.items()}
        self._yardsticks = RememberedYardsticks(bundle, exact)
        self._digests = _digests(bundle.path)
        # The formula of a whole model includes all its layers, and its results for a full sweep would fill the memory.
        self._cases: Selection = "full" if self._target.decoder is None else "quick"
        report = verify_bundle(
            path,
            cases=self._cases,
            run_options=self._options,
            open_artifact=LocalArtifact,
            yardsticks=self._yardsticks,
        )
        # This run also computed the yardsticks for all faults.
        if not report.passed:
            raise VerificationError(
                f"{path} fails verification without any fault, so a self-test would prove nothing: "
                f"{report.first_failure()}"
            )
        possible, why_not = faults_of(self._target), _why_not_export(self._target)
        self.faults = [fault for fault in possible if why_not is None or fault.place not in ("block", "model")]
        self.skipped = [
            Skipped(name=fault.name, reason=why_not or "") for fault in possible if fault not in self.faults
        ]

    def run(self, fault: Fault) -> FaultResult:
        """Introduce one fault into a copy of the bundle and verify it.

        Raises:
            ExportError: the fault could not be introduced.
        """
        with tempfile.TemporaryDirectory(prefix="diffdeploy-fault-") as folder:
            copy = Path(folder) / "bundle"
            # A separate copy for each fault, so that no fault remains when the next one is tried.
            shutil.copytree(self._target.path, copy)
            self._inject(fault, replace(self._target, path=copy))
            return self._verify(fault, copy)

    def _inject(self, fault: Fault, target: FaultTarget) -> None:
        try:
            fault.inject(target)
        except DiffDeployError as error:  # the format does not support the faulty block
            raise ExportError(str(error)) from error
        if fault.new_digests:
            manifest = Manifest.from_bytes((target.path / MANIFEST).read_bytes())
            write_manifest(target.path, manifest)
        # A fault without effect would count as not detected, although the verification is correct.
        if fault.is_put_into_files and _digests(target.path) == self._digests:
            raise ExportError(f"the fault {fault.name} does not change the artifact")

    def _verify(self, fault: Fault, copy: Path) -> FaultResult:
        # If config, graph or weights change, so do the exact results, which must be computed again for every case.
        same = self._is_held_against_the_same(copy)
        try:
            report = verify_bundle(
                copy,
                cases=self._cases if same else "quick",
                # The copy differs from a trusted bundle only by the fault, and nobody signed it: if the key were
                # required, each copy would be refused before anything else is tested.
                run_options=replace(self._options, trust=True, public_key=None),
                open_artifact=partial(LocalArtifact, wrap=fault.wrap, stand_in=fault.stand_in),
                yardsticks=self._yardsticks if same else None,
                # One failure is enough; the rest of the sweep would take most of the time.
                first_failure_only=True,
            )
        except DiffDeployError as error:
            return FaultResult.refused(fault, str(error))
        return FaultResult.of(fault, report)

    def _is_held_against_the_same(self, copy: Path) -> bool:
        manifest = Manifest.from_bytes((copy / MANIFEST).read_bytes())
        promised = (manifest.config, manifest.graph) == (self._target.manifest.config, self._target.spec)
        weights = copy / WEIGHTS
        # The fault may have removed the file.
        return promised and weights.exists() and file_sha256(weights) == self._digests[WEIGHTS]


def self_test(
    path: str | Path,
    *,
    run_options: RunOptions | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> SelfTest:
    """Introduce every fault that a bundle could have into copies of it, one at a time, and verify each.

    Args:
        path: directory of the bundle, which is not changed.
        run_options: see `Trials`.
        progress: callback that receives the number of faults done, the total number, and the name of the next fault.

    Raises:
        DiffDeployError: see `Trials`.
    """
    trials = Trials(path, run_options)
    results: list[FaultResult] = []
    skipped = list(trials.skipped)
    for done, fault in enumerate(trials.faults):
        progress(done, len(trials.faults), fault.name)
        try:
            results.append(trials.run(fault))
        except ExportError as error:
            skipped.append(Skipped(name=fault.name, reason=str(error)))
    return SelfTest.of(results, skipped)


def _why_not_export(target: FaultTarget) -> str | None:
    """Reason why faults in the computation are skipped for a format; ``None`` if they are not."""
    found = target.format
    # The same program before compilation has its own format, whose trials take seconds.
    if found.compiles:
        return f"it requires a compilation; export with --format pt2 to test the program that {found.name} compiles"
    return found.why_not_export(found.device_of(ExportOptions(device=target.manifest.options.device)))


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file_sha256(file)
        for file in sorted(directory.rglob("*"))
        # The target of a link is not a file of the bundle.
        if file.is_file() and not file.is_symlink()
    }
