"""Faults in the computation: blocks with one wrong step, or with another config."""

from diffdeploy.selftest.blocks import attention, cache, configs, heads, positions, values
from diffdeploy.selftest.blocks.entry import BLOCK_FAULTS

__all__ = ["BLOCK_FAULTS", "attention", "cache", "configs", "heads", "positions", "values"]
