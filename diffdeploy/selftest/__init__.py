"""Self-test: faults that a correct bundle could have, introduced on purpose to check that verification detects them."""

from diffdeploy.selftest.fault import Fault, FaultTarget
from diffdeploy.selftest.registry import all_faults
from diffdeploy.selftest.results import Family, FaultResult, SelfTest, Skipped
from diffdeploy.selftest.trials import Trials, self_test

__all__ = ["Family", "Fault", "FaultResult", "FaultTarget", "SelfTest", "Skipped", "Trials", "all_faults", "self_test"]
