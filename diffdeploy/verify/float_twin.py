"""What is compared with the formula: an artifact and, if it quantises activations, its twin with float activations.

Quantised activations blur the outputs of a whole model: a rounding that differs by chance moves them by more than a
small fault does. Without the rounding, the same file must pass the ordinary criterion, which proves its weights and its
wiring; `diffdeploy.verify.products` proves the rounding.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffdeploy.bundle import Bundle, Quantisation, open_bundle, write_manifest
from diffdeploy.formats import Check, require_format
from diffdeploy.verify.products import check_products
from diffdeploy.verify.report import CaseReport
from diffdeploy.verify.worker import Artifact
from diffdeploy.verify.yardsticks import FloatYardsticks, Yardsticks

__all__ = ["OpenArtifact", "Subject", "subjects_of"]

OpenArtifact = Callable[[Path], Artifact]
_SUFFIX = "float32 activations"


@dataclass(frozen=True)
class Subject:
    """One artifact that is compared with the formula.

    Attributes:
        bundle: bundle with the artifact.
        artifact: object that runs it.
        yardsticks: yardsticks for it.
        quantisation: quantisation of its activations, or ``None``.
        is_twin: true if it was written for the verification only.
    """

    bundle: Bundle
    artifact: Artifact
    yardsticks: Yardsticks
    quantisation: Quantisation | None = None
    is_twin: bool = False

    def case(self, report: CaseReport) -> CaseReport:
        """A report on it, under names that no other subject uses."""
        if not self.is_twin:
            return report
        names = {"id": f"{report.id}-{_SUFFIX.replace(' ', '-')}", "group": f"{report.group}, {_SUFFIX}"}
        return report.model_copy(update=names)

    def check(self, check: Check) -> Check:
        """A check of it, under a name that no other subject uses."""
        return check.model_copy(update={"name": f"{check.name}, {_SUFFIX}"}) if self.is_twin else check


@contextmanager
def subjects_of(
    bundle: Bundle, artifact: Artifact, yardsticks: Yardsticks, seed: int, open_artifact: OpenArtifact
) -> Iterator[tuple[list[Subject], list[Check]]]:
    """The artifact of a bundle and, for the ``with`` block, its twin, with checks of quantised activations.

    Args:
        bundle: an opened bundle.
        artifact: object that runs its artifact.
        yardsticks: yardsticks for it.
        seed: random seed for the inputs of the checks.
        open_artifact: function that opens the artifact in another directory.
    """
    how = bundle.manifest.options.quantised_activations
    if how is None:
        yield [Subject(bundle, artifact, yardsticks)], []
        return
    products = check_products(bundle, how, seed)
    if not products.are_quantised:
        # Without a kernel for it, the artifact is its own twin.
        yield [Subject(bundle, artifact, FloatYardsticks(yardsticks))], [products.check]
        return
    subject = Subject(bundle, artifact, yardsticks, how)
    with tempfile.TemporaryDirectory(prefix="diffdeploy-twin-") as folder, ExitStack() as stack:
        path = Path(folder) / "bundle"
        try:
            _write_twin(bundle, how, path)
            other = stack.enter_context(open_artifact(path))
            other.backend  # noqa: B018 - waits until it is loaded
        except Exception as error:  # noqa: BLE001 - libraries raise any error for a damaged artifact
            failed = Check(name=_SUFFIX, passed=False, detail=f"the artifact does not run with them: {error}")
            subjects, checks = [subject], [products.check, failed]
        else:
            twin = Subject(open_bundle(path), other, FloatYardsticks(yardsticks), is_twin=True)
            subjects, checks = [subject, twin], [products.check]
        yield subjects, checks


def _write_twin(bundle: Bundle, quantisation: Quantisation, path: Path) -> None:
    manifest = bundle.manifest
    changed = require_format(manifest.format).with_float_activations(bundle)
    for name in manifest.files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name in changed:
            (path / name).write_bytes(changed[name])
        else:
            _link(bundle.path / name, path / name)
    how = quantisation.model_copy(update={"accuracy_level": 0})
    options = manifest.options.model_copy(update={"quantisation": how})
    write_manifest(path, manifest.model_copy(update={"options": options}))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another file system: weights take gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
