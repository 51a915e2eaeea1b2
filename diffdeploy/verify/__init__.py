"""Verification: an artifact is accepted if it computes what its weights and config define."""

from diffdeploy.budgets import BUDGETS, Budget
from diffdeploy.formats import Check
from diffdeploy.verify.artifact_checks import artifact_checks, artifact_facts
from diffdeploy.verify.golden import golden_arrays, verify_golden
from diffdeploy.verify.layers import num_judged_layers
from diffdeploy.verify.loss import WINDOW, Loss, measure_loss
from diffdeploy.verify.metrics import rejudge
from diffdeploy.verify.report import CaseReport, OutputReport, RejectedError, Report, read_report
from diffdeploy.verify.run import Progress, verify_bundle
from diffdeploy.verify.sweep import longest_case

__all__ = [
    "BUDGETS",
    "WINDOW",
    "Budget",
    "CaseReport",
    "Check",
    "Loss",
    "OutputReport",
    "Progress",
    "RejectedError",
    "Report",
    "artifact_checks",
    "artifact_facts",
    "golden_arrays",
    "longest_case",
    "measure_loss",
    "num_judged_layers",
    "read_report",
    "rejudge",
    "verify_bundle",
    "verify_golden",
]
