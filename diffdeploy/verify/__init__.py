"""Verification: an artifact is accepted when it computes what its weights and config say."""

from diffdeploy.verify.report import CaseReport, Check, GraphFacts, RejectedError, Report
from diffdeploy.verify.run import Progress, golden_arrays, verify_bundle

__all__ = [
    "CaseReport",
    "Check",
    "GraphFacts",
    "Progress",
    "RejectedError",
    "Report",
    "golden_arrays",
    "verify_bundle",
]
