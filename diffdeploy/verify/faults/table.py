"""All faults."""

from diffdeploy.verify.faults.base import Fault, Subject
from diffdeploy.verify.faults.blocks import BLOCK_FAULTS
from diffdeploy.verify.faults.bundles import BUNDLE_FAULTS
from diffdeploy.verify.faults.graph_onnx import ONNX_FAULTS
from diffdeploy.verify.faults.graph_pt2 import PT2_FAULTS
from diffdeploy.verify.faults.numbers import NUMBER_FAULTS
from diffdeploy.verify.faults.precision import PRECISION_FAULTS
from diffdeploy.verify.faults.runtimes import RUNTIME_FAULTS
from diffdeploy.verify.faults.weights import WEIGHT_FAULTS

__all__ = ["FAULTS", "faults_of"]

# Cheap ones first, and those that have to be exported last.
FAULTS: list[Fault] = [
    *WEIGHT_FAULTS,
    *PRECISION_FAULTS,
    *NUMBER_FAULTS,
    *ONNX_FAULTS,
    *PT2_FAULTS,
    *BUNDLE_FAULTS,
    *RUNTIME_FAULTS,
    *BLOCK_FAULTS,
]


def faults_of(subject: Subject) -> list[Fault]:
    """The faults that a bundle could have."""
    return [fault for fault in FAULTS if fault.applies(subject)]
