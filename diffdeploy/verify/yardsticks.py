"""What an artifact is held against on a case: the exact outputs, and the error of the eager block."""

from collections.abc import Mapping

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, eager_block
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.eager import eager_error, run_arrays
from diffdeploy.verify.metrics import Yardstick
from diffdeploy.verify.oracle import exact_and_stored

__all__ = ["Yardsticks"]


class Yardsticks:
    """Computes yardsticks.

    Args:
        bundle: whose config and weights count.
        exact_weights: its weights, float64.
    """

    def __init__(self, bundle: Bundle, exact_weights: Mapping[str, Array]) -> None:
        self._config, self._dtype = bundle.manifest.config, bundle.manifest.graph.dtype
        self._weights = exact_weights
        # The formula as it is written, which no format ships.
        self._eager = run_arrays(eager_block(bundle, impl="naive"))

    def of(self, case: AnyCase, inputs: Mapping[str, Array]) -> dict[str, Yardstick]:  # noqa: ARG002 - a cache may
        """Of all outputs of a case, by name."""
        expected, stored = exact_and_stored(self._config, self._weights, inputs, self._dtype)
        yardsticks = eager_error(self._eager, inputs, expected, self._dtype)
        # The cache is what projections gave, and no stream is stored on the way to it.
        yardsticks["output"].add_stored(stored)
        return yardsticks
