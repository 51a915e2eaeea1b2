"""Faults that only some of a graph's legal inputs reveal."""

from diffdeploy.selftest.legal.masks import MASKS_FAULTS, POSITIONS_FAULTS
from diffdeploy.selftest.legal.sizes import BATCHES_FAULTS, LENGTHS_FAULTS
from diffdeploy.selftest.legal.values import EXACT_VALUES_FAULTS, VALUES_FAULTS

__all__ = ["LEGAL_INPUT_FAULTS"]

LEGAL_INPUT_FAULTS = [
    *MASKS_FAULTS,
    *POSITIONS_FAULTS,
    *BATCHES_FAULTS,
    *LENGTHS_FAULTS,
    *VALUES_FAULTS,
    *EXACT_VALUES_FAULTS,
]
