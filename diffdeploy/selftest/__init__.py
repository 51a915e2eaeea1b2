"""Self-test: faults that a right bundle could have, put in on purpose to see that verification catches them."""

from diffdeploy.selftest.fault import Fault, FaultTarget
from diffdeploy.selftest.registry import all_faults
from diffdeploy.selftest.results import Family, FaultResult, SelfTest, Skipped
from diffdeploy.selftest.trials import Trials, self_test

__all__ = ["Family", "Fault", "FaultResult", "FaultTarget", "SelfTest", "Skipped", "Trials", "all_faults", "self_test"]
