"""The table of implementations: each module of `diffdeploy.ops` enters its own.

A new one is one more module that calls `register` and a row in `diffdeploy.ops.api`, which imports it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.request import Request

__all__ = ["Implementation", "cheapest", "implementation", "register"]

Run = Callable[[Request], Tensor]
AnyRun = TypeVar("AnyRun", bound=Run)
Supports = Callable[[Request], DiffDeployError | None]
Cost = Callable[[Request], float]


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operator.

    Attributes:
        impl: its name.
        run: computes ``[B, h, S, e]``.
        supports: gives ``None``, or why not: the error that an explicit choice of it raises. ``None`` for one that
            takes every request.
        cost: estimated time as a ratio to `naive` for the same request. Where the request is traced it may look at
            widths, dtype and device alone.
        num_attentions: softmax attentions of a graph that holds it: operators where it calls fused ones.
    """

    impl: Impl
    run: Run
    supports: Supports | None
    cost: Cost | float
    num_attentions: int

    def why_not(self, request: Request) -> DiffDeployError | None:
        """Why it cannot take a request; ``None`` when it can."""
        return None if self.supports is None else self.supports(request)

    def cost_of(self, request: Request) -> float:
        """Estimated time, as a ratio to `naive`."""
        return self.cost if isinstance(self.cost, float) else self.cost(request)


_TABLE: dict[Impl, Implementation] = {}


def register(
    impl: Impl, *, cost: Cost | float, num_attentions: int, supports: Supports | None = None
) -> Callable[[AnyRun], AnyRun]:
    """Enter a function into the table; see `Implementation` for the arguments."""

    def enter(run: AnyRun) -> AnyRun:
        assert impl not in _TABLE
        _TABLE[impl] = Implementation(impl, run, supports, cost, num_attentions)
        return run

    return enter


def implementation(impl: Impl) -> Implementation:
    """A row of the table.

    Raises:
        InputError: ``auto``, which is none.
    """
    if impl not in _TABLE:
        raise InputError(f"{impl.value} is not an implementation; accepted: {', '.join(_TABLE)}")
    return _TABLE[impl]


def cheapest(request: Request) -> Implementation:
    """What ``auto`` takes: of those that support a request the one of least cost, by the figures of its own module."""
    best, least = None, math.inf
    for candidate in _TABLE.values():
        cost = candidate.cost_of(request)
        # Asked last, since some look for packages or at the mask.
        if cost < least and candidate.why_not(request) is None:
            best, least = candidate, cost
    assert best is not None  # naive takes everything
    return best
