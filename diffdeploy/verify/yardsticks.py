"""What an artifact is held against on a case: the exact outputs, and the error of the eager block."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, eager_block
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.eager import eager_errors, for_queries, run_arrays
from diffdeploy.verify.metrics import Yardstick
from diffdeploy.verify.oracle import exact_and_stored

__all__ = ["Held", "Yardsticks"]


@dataclass(frozen=True)
class Held:
    """What the outputs of some rows are held against.

    Attributes:
        rows: rows of the batch.
        yardsticks: by names of outputs.
    """

    rows: Array
    yardsticks: Mapping[str, Yardstick]


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
        self._block = eager_block(bundle, impl="naive")
        self._eager = run_arrays(self._block)
        # Only float16 ends before the scores of outliers do.
        self._fused = eager_block(bundle, impl="two_call") if self._dtype == "float16" else None

    def of(self, case: AnyCase, inputs: Mapping[str, Array]) -> list[Held]:
        """Of all outputs of a case: for the batch, or for each row where rows are judged by themselves."""
        sources, queries = case.sources(), case.queries()
        distinct = int(sources.max()) + 1
        inputs = {name: array[:distinct] for name, array in inputs.items()}
        groups = [slice(row, row + 1) for row in range(distinct)] if case.by_row else [slice(None)]
        expected, stored = exact_and_stored(self._config, self._weights, inputs, self._dtype, queries)
        with for_queries(self._block, queries):
            found = eager_errors(self._eager, inputs, expected, self._dtype, groups)
        for rows, yardsticks in zip(groups, found, strict=True):
            # The cache is what projections gave, and no stream is stored on the way to it.
            for output in stored:
                yardsticks["output"].add_stored(output[rows])
        if case.is_extreme and self._fused is not None:
            # A kernel adds masks to scores, and infinity minus infinity is NaN where a hidden key has overflowed;
            # eager puts the mask in place of the score.
            with for_queries(self._fused, queries):
                fused = run_arrays(self._fused)(inputs)
            for rows, yardsticks in zip(groups, found, strict=True):
                for name, yardstick in yardsticks.items():
                    yardstick.set_aside(fused[name][rows])
        if not case.by_row:
            return [Held(np.arange(distinct), found[0])]
        return [Held(np.array([row]), found[source]) for row, source in enumerate(sources)]
