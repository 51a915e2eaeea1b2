"""All faults: those of any format, and those of one format's files."""

from functools import cache

from diffdeploy.formats import FileFault, Format, formats
from diffdeploy.selftest.blocks import BLOCK_FAULTS
from diffdeploy.selftest.bundle_files import BUNDLE_FILE_FAULTS
from diffdeploy.selftest.fault import Fault, FaultTarget
from diffdeploy.selftest.legal import LEGAL_INPUT_FAULTS
from diffdeploy.selftest.models import model_faults
from diffdeploy.selftest.numbers import NUMBER_FAULTS
from diffdeploy.selftest.precision import PRECISION_FAULTS
from diffdeploy.selftest.runtimes import RUNTIME_FAULTS
from diffdeploy.selftest.weights import WEIGHT_FAULTS

__all__ = ["all_faults", "faults_of"]


@cache
def all_faults() -> tuple[Fault, ...]:
    """Every fault, in the order of trials: cheap ones first, and those that need an export last."""
    # A format describes faults in its own files without knowing the self-test, which is in a higher layer.
    of_files = [_of_format(each, fault) for each in formats().values() for fault in each.file_faults()]
    return (
        *WEIGHT_FAULTS,
        *PRECISION_FAULTS,
        *NUMBER_FAULTS,
        *of_files,
        *BUNDLE_FILE_FAULTS,
        *RUNTIME_FAULTS,
        *LEGAL_INPUT_FAULTS,
        *BLOCK_FAULTS,
    )


def _of_format(owner: Format, fault: FileFault) -> Fault:
    def inject(target: FaultTarget) -> None:
        fault.edit(target.path)

    def applies(target: FaultTarget) -> bool:
        return target.manifest.format == owner.name and fault.applies(target.manifest)

    return Fault(
        name=fault.name, place=fault.place, breaks=fault.breaks, inject=inject, applies=applies, of_models=True
    )


def faults_of(target: FaultTarget) -> list[Fault]:
    """Faults that a bundle could have."""
    if target.decoder is None:
        return [fault for fault in all_faults() if fault.applies(target)]
    of_both = [fault for fault in all_faults() if fault.of_models]
    # Those that need an export come last.
    by_cost = sorted((*model_faults(target.decoder), *of_both), key=lambda fault: fault.place == "model")
    return [fault for fault in by_cost if fault.applies(target)]
