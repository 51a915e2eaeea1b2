"""Fault injection: faults that a right bundle could have, put in on purpose to see that verification catches them."""

from diffdeploy.verify.faults.base import Fault, Lower
from diffdeploy.verify.faults.results import FaultResult, SelfTest, Skipped
from diffdeploy.verify.faults.selftest import Trials, self_test
from diffdeploy.verify.faults.table import FAULTS

__all__ = ["FAULTS", "Fault", "FaultResult", "Lower", "SelfTest", "Skipped", "Trials", "self_test"]
