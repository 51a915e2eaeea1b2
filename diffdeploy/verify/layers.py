"""Verification of each layer of a model, and of the head, by the criterion for blocks.

A layer is judged on the input that it has in the artifact. Its errors are therefore not mixed with those of earlier
layers, so a fault in one layer is as visible as in a block, and the report can name the layer.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffdeploy.arrays import Array
from diffdeploy.bundle import Bundle, Quantisation
from diffdeploy.errors import ExportError
from diffdeploy.formats import Check, LayerValues, require_format
from diffdeploy.locate import Finding
from diffdeploy.processes import return_freed_memory
from diffdeploy.verify.cases import Case
from diffdeploy.verify.decoder import below, exact_embedding, exact_head, exact_layer, inputs_of_layer
from diffdeploy.verify.eager import eager_error, run_head, run_layer
from diffdeploy.verify.metrics import Yardstick, measure
from diffdeploy.verify.model_sweep import layer_case
from diffdeploy.verify.products import ACTIVATIONS
from diffdeploy.verify.report import CaseReport

if TYPE_CHECKING:
    from diffdeploy.modules import DiffTransformer

__all__ = ["guilty_layer", "layer_reports", "num_judged_layers"]

_GROUP, _HEAD = "each layer", "head"

# Checks that can name a wrong weight or number, and the form in which they name its layer.
_OF_CONSTANTS, _LAYER = ("weights", "lambda"), re.compile(r"layers\.(\d+)\.")


def layer_reports(
    bundle: Bundle,
    model: "DiffTransformer",
    weights: Mapping[str, Array],
    seed: int,
    quantisation: Quantisation | None = None,
) -> list[CaseReport]:
    """Report on each layer and on the head; empty for a format whose intermediate values cannot be observed.

    Args:
        bundle: bundle of a model.
        model: eager model, with the formula as the paper writes it.
        weights: canonical weights in the artifact's dtype.
        seed: random seed for the tokens.
        quantisation: quantisation of the matrices, if the artifact quantises activations, too.
    """
    values = require_format(bundle.manifest.format).layer_values(bundle)
    if values is None:
        return []
    return _Layers(bundle, model, weights, quantisation).reports(layer_case(bundle.manifest.graph, seed), values)


class _Layers:
    def __init__(
        self,
        bundle: Bundle,
        model: "DiffTransformer",
        weights: Mapping[str, Array],
        quantisation: Quantisation | None,
    ) -> None:
        self._bundle, self._model, self._weights, self._quantisation = bundle, model, weights, quantisation
        self._config, self._dtype = model.config, bundle.manifest.graph.dtype

    def reports(self, case: Case, values: LayerValues) -> list[CaseReport]:
        spec = self._bundle.manifest.graph
        inputs = case.inputs(spec)
        return_freed_memory()  # the graph is loaded once more
        try:
            shown = values(inputs)
        except ExportError as error:
            # A separate group, since no layer was judged.
            return [CaseReport.did_not_run(f"layers-{case.id}", "all layers", str(error))]
        reports = []
        # The embedding copies a row, without rounding.
        x_BSD = exact_embedding(self._weights, inputs).astype(self._dtype)
        for number in range(self._config.num_layers):
            reports.append(self._layer(number, x_BSD, inputs, shown))
            x_BSD = shown[f"layers.{number}.output"]
        return [*reports, self._head(x_BSD, shown[spec.main_output])]

    def _layer(self, number: int, x_BSD: Array, inputs: Mapping[str, Array], shown: Mapping[str, Array]) -> CaseReport:
        weights = below(self._weights, f"layers.{number}.")
        given, layer, eps = inputs_of_layer(inputs, number), self._config.layers[number], self._config.norm_eps
        exact, caches = exact_layer(layer, eps, weights, x_BSD, given)
        expected = {"output": exact, **{f"present.{side}": array for side, array in caches.items()}}
        yardsticks = eager_error(
            run_layer(self._model, number), {"hidden_states": x_BSD, **given}, expected, self._dtype
        )
        yardsticks["output"].add_stored(exact_layer(layer, eps, weights, x_BSD, given, self._dtype)[0])
        if self._quantisation is not None:
            blocks = self._quantisation.activation_blocks
            exact, caches = exact_layer(layer, eps, weights, x_BSD, given, None, blocks)
            quantised = {"output": exact, **{f"present.{side}": array for side, array in caches.items()}}
            yardsticks = {name: yardsticks[name].with_quantised(array) for name, array in quantised.items()}
        actual = {
            "output": shown[f"layers.{number}.output"],
            **{f"present.{side}": shown[f"present.{number}.{side}"] for side in ("key", "value")},
        }
        outputs = [measure(name, actual[name], yardsticks[name]) for name in expected]
        return CaseReport.of(f"layer{number}", _GROUP, outputs)

    def _head(self, x_BSD: Array, logits: Array) -> CaseReport:
        if logits.shape[1] == 1:
            x_BSD = x_BSD[:, -1:]
        yardstick = Yardstick(exact_head(self._config, self._weights, x_BSD), self._dtype)
        yardstick.add(run_head(self._model, x_BSD))
        if self._quantisation is not None and self._quantisation.head:
            quantised = exact_head(self._config, self._weights, x_BSD, self._quantisation)
            yardstick = yardstick.with_quantised(quantised)
        return CaseReport.of(_HEAD, _GROUP, [measure("logits", logits, yardstick)])


def num_judged_layers(reports: list[CaseReport]) -> int:
    """Number of layers that were judged separately; 0 for a format whose intermediate values cannot be observed."""
    return sum(report.group == _GROUP and report.id != _HEAD for report in reports)


def guilty_layer(reports: list[CaseReport], checks: list[Check]) -> Finding | None:
    """Find the first layer with a wrong constant or a deviation on its own input, or the head.

    Args:
        reports: reports on the cases, including those on the layers.
        checks: checks of the contract.

    Returns:
        The finding, or ``None`` if no layer is at fault.
    """
    # A named constant is certain evidence, even if it is off by less than rounding.
    for check in checks:
        if not check.passed and check.name in _OF_CONSTANTS and (named := _LAYER.search(check.detail)):
            return Finding(stage=f"layer {named[1]}", found_by="constants", detail=check.detail)
    for check in checks:
        if not check.passed and check.name == ACTIVATIONS and (named := _LAYER.search(check.detail)):
            return Finding(stage=f"layer {named[1]}", found_by="intermediate values", detail=check.detail)
    failed = [report for report in reports if report.group.startswith(_GROUP) and not report.passed]
    if not failed:
        return None
    # Those with float activations have a longer name. They come first, since they are exact.
    guilty = max(failed, key=lambda report: len(report.group))
    stage = guilty.id.partition("-")[0]
    output = "" if stage == _HEAD else f" in its {guilty.output}"
    return Finding(
        stage=stage.replace("layer", "layer "),
        found_by="intermediate values",
        detail=f"given its input in the artifact, it deviates{output}: {guilty.failure}",
    )
