"""Benchmarks of the speed and memory of implementations and bundles, which are verified before they are timed."""

from diffdeploy.bench.changes import Change, changes_since
from diffdeploy.bench.plan import SOFTMAX, SOFTMAX_BLOCKS, SOFTMAX_COMPILED, Candidate, Plan, Size
from diffdeploy.bench.results import BenchReport, Block, Row
from diffdeploy.bench.run import Bench, Progress
from diffdeploy.bench.synthetic import random_checkpoint

__all__ = [
    "SOFTMAX",
    "SOFTMAX_BLOCKS",
    "SOFTMAX_COMPILED",
    "Bench",
    "BenchReport",
    "Block",
    "Candidate",
    "Change",
    "Plan",
    "Progress",
    "Row",
    "Size",
    "changes_since",
    "random_checkpoint",
]
