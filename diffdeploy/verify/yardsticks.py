"""Yardsticks for an artifact on a case: the exact outputs, and the error of the eager block."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Quantisation, eager_module
from diffdeploy.config import DecoderConfig
from diffdeploy.graphs import GraphSpec, clear_padding
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.decoder import exact_ways
from diffdeploy.verify.eager import eager_errors, for_queries, run_arrays, run_layers
from diffdeploy.verify.metrics import Yardstick
from diffdeploy.verify.oracle import exact_and_stored

if TYPE_CHECKING:
    from diffdeploy.modules import DiffTransformer

__all__ = ["FloatYardsticks", "Held", "RememberedYardsticks", "Yardsticks"]


class Held(NamedTuple):
    """A yardstick for some rows of an output.

    Attributes:
        rows: rows of the batch.
        yardstick: yardstick for them.
    """

    rows: Array
    yardstick: Yardstick


# The name of an output, and yardsticks for all of its rows.
OfOutput = tuple[str, Sequence[Held]]


class Yardsticks:
    """Computes yardsticks of a block or a model.

    Args:
        bundle: bundle with the config and the weights.
        exact_weights: its weights, float64.
    """

    def __init__(self, bundle: Bundle, exact_weights: Mapping[str, Array]) -> None:
        self._config, self._spec = bundle.manifest.config, bundle.manifest.graph
        self._dtype = self._spec.dtype
        self._weights = exact_weights
        # Of a model whose activations are quantised, too.
        self._quantisation = bundle.manifest.options.quantised_activations
        self._last: tuple[AnyCase, list[_Pair]] | None = None
        # The formula as the paper writes it, which no format ships.
        self._block = eager_module(bundle, impl="naive")
        # Of a block; `run_layers` computes those of a model. Only float16 overflows on the scores of outliers.
        self._eager = run_arrays(self._block)
        overflows = self._dtype == "float16" and not isinstance(self._config, DecoderConfig)
        self._fused = eager_module(bundle, impl="two_call") if overflows else None

    @property
    def model(self) -> "DiffTransformer | None":
        """The eager model whose errors are the yardstick; ``None`` for a block."""
        from diffdeploy.modules import DiffTransformer

        return self._block if isinstance(self._block, DiffTransformer) else None

    def of(self, case: AnyCase, inputs: Mapping[str, Array]) -> Iterable[OfOutput]:
        """Yardsticks for each output of a case: for the batch, or for each row if rows are judged separately.

        Those of a model are computed as they are asked for, one layer at a time: use one before asking for the next,
        since all caches in fp64 would take more memory than the model.
        """
        if isinstance(self._config, DecoderConfig):
            if self._quantisation is None:
                return (output.floats for output in self._of_model(self._config, inputs, self._spec, None))
            return [output.quantised for output in self._pairs(self._config, case, inputs)]
        sources, queries = case.sources(), case.queries()
        distinct = int(sources.max()) + 1
        inputs = {name: array[:distinct] for name, array in inputs.items()}
        groups = [slice(row, row + 1) for row in range(distinct)] if case.by_row else [slice(None)]
        expected, stored = exact_and_stored(self._config, self._weights, inputs, self._dtype, queries)
        with for_queries(self._block, queries):
            found = eager_errors(self._eager, inputs, expected, self._dtype, groups)
        for rows, yardsticks in zip(groups, found, strict=True):
            # The cache holds results of projections, which no stored stream affects.
            for output in stored:
                yardsticks["output"].add_stored(output[rows])
        if case.is_extreme and self._fused is not None:
            # Kernels add masks to scores, and infinity minus infinity is NaN where a hidden key has overflowed; eager
            # replaces the score instead.
            with for_queries(self._fused, queries):
                fused = run_arrays(self._fused)(inputs)
            for rows, yardsticks in zip(groups, found, strict=True):
                for name, yardstick in yardsticks.items():
                    yardstick.set_aside(fused[name][rows])
        if not case.by_row:
            return [(name, [Held(np.arange(distinct), yardstick)]) for name, yardstick in found[0].items()]
        return [
            (name, [Held(np.array([row]), found[source][name]) for row, source in enumerate(sources)])
            for name in found[0]
        ]

    def of_floats(self, case: AnyCase, inputs: Mapping[str, Array]) -> Iterable[OfOutput]:
        """Yardsticks as from `of`, but for a model without quantised activations."""
        assert isinstance(self._config, DecoderConfig)
        return [output.floats for output in self._pairs(self._config, case, inputs)]

    def _pairs(self, config: DecoderConfig, case: AnyCase, inputs: Mapping[str, Array]) -> "list[_Pair]":
        # Both are asked for one after the other, and computed together.
        if self._last is None or self._last[0] is not case:
            self._last = None  # frees those of the previous case first
            self._last = case, list(self._of_model(config, inputs, self._spec, self._quantisation))
        return self._last[1]

    def of_logits(self, inputs: Mapping[str, Array], *, floats: bool = False) -> Yardstick:
        """Compute the yardstick for the logits of a model at every position, whatever its graph returns.

        Args:
            inputs: inputs by the names of the graph.
            floats: true for a model without quantised activations.
        """
        assert isinstance(self._config, DecoderConfig)
        spec = self._spec.with_all_logits()
        how = None if floats else self._quantisation
        outputs = (pair.quantised for pair in self._of_model(self._config, inputs, spec, how))
        return next(held[0].yardstick for name, held in outputs if name == spec.main_output)

    def _of_model(
        self, config: DecoderConfig, inputs: Mapping[str, Array], spec: GraphSpec, quantisation: Quantisation | None
    ) -> "Iterator[_Pair]":
        """Eager's error over all layers, and that of storing the streams of each.

        Tokens have no neighbours, but a model has more numbers to average over than a block.
        """
        assert self.model is not None
        eager = run_layers(self.model, inputs, last_only=spec.logits == "last")
        rows = np.arange(len(inputs["input_ids"]))
        exact = exact_ways(config, self._weights, inputs, spec, self._dtype, quantisation)
        # Written so that nothing is kept longer than it is needed: all logits of a prompt take hundreds of megabytes in
        # fp64, and `for` and `zip` would keep those that they yielded last.
        with ThreadPoolExecutor(1) as pool:  # numpy and torch leave some of the time of the cores to each other
            for _ in spec.outputs:
                coming = pool.submit(next, eager)
                output = next(exact)
                quantised, yardstick = output.quantised, Yardstick(output.exact, self._dtype)
                yardstick.add_stored(output.stored)
                name, array = coming.result()
                assert name == output.name
                del output, coming
                clear_padding(spec, inputs, name, array)
                yardstick.add(array)
                del array
                floats = name, [Held(rows, yardstick)]
                if quantised is None:
                    yield _Pair(floats, floats)
                else:
                    yield _Pair(floats, (name, [Held(rows, yardstick.with_quantised(quantised))]))


class _Pair(NamedTuple):
    """Yardsticks for an output of a model: without and with its quantisation of activations, if it has one."""

    floats: OfOutput
    quantised: OfOutput


class FloatYardsticks(Yardsticks):
    """Yardsticks for the model of others, without its quantisation of activations.

    Args:
        others: yardsticks of the model.
    """

    def __init__(self, others: Yardsticks) -> None:
        self._others = others

    @property
    def model(self) -> "DiffTransformer | None":
        """See `Yardsticks.model`."""
        return self._others.model

    def of(self, case: AnyCase, inputs: Mapping[str, Array]) -> Iterable[OfOutput]:
        """See `Yardsticks.of_floats`."""
        return self._others.of_floats(case, inputs)

    def of_logits(self, inputs: Mapping[str, Array], *, floats: bool = True) -> Yardstick:
        """See `Yardsticks.of_logits`."""
        return self._others.of_logits(inputs, floats=floats)


class RememberedYardsticks(Yardsticks):
    """Yardsticks that are computed once per case, for several artifacts of the same block and seed.

    Args:
        bundle: see `Yardsticks`.
        exact_weights: see `Yardsticks`.
    """

    def __init__(self, bundle: Bundle, exact_weights: Mapping[str, Array]) -> None:
        super().__init__(bundle, exact_weights)
        self._known: dict[str, list[OfOutput]] = {}
        self._known_floats: dict[str, list[OfOutput]] = {}

    def of(self, case: AnyCase, inputs: Mapping[str, Array]) -> list[OfOutput]:
        """See `Yardsticks.of`."""
        # A name identifies the inputs, since every case has the same seed.
        if case.id not in self._known:
            self._known[case.id] = list(super().of(case, inputs))
        return self._known[case.id]

    def of_floats(self, case: AnyCase, inputs: Mapping[str, Array]) -> list[OfOutput]:
        """See `Yardsticks.of_floats`."""
        if case.id not in self._known_floats:
            self._known_floats[case.id] = list(super().of_floats(case, inputs))
        return self._known_floats[case.id]
