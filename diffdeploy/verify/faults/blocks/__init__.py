"""Faults in the computation: blocks with one wrong step, or of another config."""

from diffdeploy.verify.faults.blocks import attention, cache, configs, heads, positions
from diffdeploy.verify.faults.blocks.entry import BLOCK_FAULTS

__all__ = ["BLOCK_FAULTS", "attention", "cache", "configs", "heads", "positions"]
