"""The operator ``softmax(q1 k1) v - lambda softmax(q2 k2) v`` and its implementations."""

from diffdeploy.ops.api import diff_attention, resolve_impl
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.request import HeadNorm

__all__ = ["HeadNorm", "Impl", "diff_attention", "resolve_impl"]
