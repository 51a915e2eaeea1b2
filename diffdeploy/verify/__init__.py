"""Verification: an artifact is accepted when it computes what its weights and config say."""

from diffdeploy.verify.golden import golden_arrays, verify_golden
from diffdeploy.verify.metrics import BUDGETS, rejudge
from diffdeploy.verify.report import (
    Budget,
    CaseReport,
    Check,
    GraphFacts,
    OutputReport,
    RejectedError,
    Report,
    read_report,
)
from diffdeploy.verify.run import Progress, verify_bundle
from diffdeploy.verify.sweep import Selection

__all__ = [
    "BUDGETS",
    "Budget",
    "CaseReport",
    "Check",
    "GraphFacts",
    "OutputReport",
    "Progress",
    "RejectedError",
    "Report",
    "Selection",
    "golden_arrays",
    "read_report",
    "rejudge",
    "verify_bundle",
    "verify_golden",
]
