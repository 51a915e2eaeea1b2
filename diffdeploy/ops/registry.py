"""The table of implementations, in which each module of `diffdeploy.ops` registers its own.

To add one, write a module that calls `register`, and add it to `diffdeploy.ops.api.IMPLEMENTATION_MODULES`.
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
    """One implementation of the operator.

    Attributes:
        impl: name of the implementation.
        run: function that computes the heads, ``[B, h, S, e]``.
        supports: function that returns ``None`` for a supported request, and otherwise the error that an explicit
            choice of the implementation raises. ``None`` if every request is supported.
        cost: estimated time as a ratio to `naive` for the same request. For a traced request, it may depend only on
            widths, dtype and device.
        num_attentions: number of fused attention operators in a graph with this implementation; number of softmaxes if
            attentions are decomposed.
        normalises: true if ``run`` also computes the norm of a request.
    """

    impl: Impl
    run: Run
    supports: Supports | None
    cost: Cost | float
    num_attentions: int
    normalises: bool

    def why_not(self, request: Request) -> DiffDeployError | None:
        """Error that explains why the implementation does not support a request; ``None`` if it does."""
        return None if self.supports is None else self.supports(request)

    def cost_of(self, request: Request) -> float:
        """Estimated time, as a ratio to `naive`."""
        return self.cost if isinstance(self.cost, float) else self.cost(request)


_TABLE: dict[Impl, Implementation] = {}


def register(
    impl: Impl,
    *,
    cost: Cost | float,
    num_attentions: int,
    supports: Supports | None = None,
    normalises: bool = False,
) -> Callable[[AnyRun], AnyRun]:
    """Decorate a function to register it as an implementation; see `Implementation` for the arguments."""

    def enter(run: AnyRun) -> AnyRun:
        assert impl not in _TABLE
        _TABLE[impl] = Implementation(impl, run, supports, cost, num_attentions, normalises)
        return run

    return enter


def implementation(impl: Impl) -> Implementation:
    """Look up an implementation.

    Raises:
        InputError: ``impl`` is ``auto``, which is not an implementation.
    """
    if impl not in _TABLE:
        raise InputError(f"{impl.value} is not an implementation; accepted: {', '.join(_TABLE)}")
    return _TABLE[impl]


def cheapest(request: Request) -> Implementation:
    """Implementation that ``auto`` selects: of those that support a request, the one with the lowest estimated cost."""
    best, least = None, math.inf
    for candidate in _TABLE.values():
        cost = candidate.cost_of(request)
        # Support is checked last, since some checks look for packages or inspect the mask.
        if cost < least and candidate.why_not(request) is None:
            best, least = candidate, cost
    assert best is not None  # naive supports every request
    return best
