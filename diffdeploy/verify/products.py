"""Check of the products with quantised matrices: each rounds its own input to int8, bit for bit as the formula does.

The input is the one that the operator has in the artifact, so no rounding can differ by chance, unlike in a comparison
of whole models. Constants and wiring are checked elsewhere: see `diffdeploy.verify.float_twin`.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from diffdeploy.arrays import Array, epsilon
from diffdeploy.bundle import Bundle, Quantisation
from diffdeploy.errors import ExportError
from diffdeploy.formats import Check, Product, require_format
from diffdeploy.verify.activations import rounded_activations
from diffdeploy.verify.model_sweep import layer_case

__all__ = ["ACTIVATIONS", "Products", "check_products"]

# Name of the check.
ACTIVATIONS = "activations"
# Largest error of a product, as a share of the distance by which rounding its input moves it. Sums in float32 were off
# by at most 2e-4 of it. A single activation among 34 * 344 that becomes the wrong neighbour costs
# sqrt(12 / (34 * 344)) = 0.03 of it.
_SHARE = 0.01
# Where rounding moves nothing: sums in another order, in multiples of the spacing at the size of the result.
_FLOOR = 16.0


class Products(NamedTuple):
    """The verdict on the products.

    check: passed if all of them compute in the same way, and this is a known one.
    are_quantised: false if they do not round their inputs on this machine.
    """

    check: Check
    are_quantised: bool


class _Compared(NamedTuple):
    """Errors of one product: against that with a rounded input, and against that with the input as it is."""

    name: str
    rounded: float
    as_it_is: float
    moved: float
    floor: float

    @property
    def allowed(self) -> float:
        return _SHARE * self.moved + self.floor


def check_products(bundle: Bundle, quantisation: Quantisation, seed: int) -> Products:
    """Check the product of each quantised matrix in several positions at once, and in one, as in decoding.

    Args:
        bundle: bundle of a model with quantised activations.
        quantisation: quantisation of its matrices.
        seed: random seed for the tokens.
    """
    try:
        runs = _compared(bundle, quantisation, seed)
    except ExportError as error:
        return Products(Check(name=ACTIVATIONS, passed=False, detail=f"the artifact did not run: {error}"), True)
    compared = [each for run in runs for each in run]
    if not compared:
        return Products(Check(name=ACTIVATIONS, passed=False, detail="the graph has no quantised matrix"), True)
    count = len(runs[0])
    # Written as `not <=`, so that NaN is wrong, too.
    wrong = [each for each in compared if not each.rounded <= each.allowed]
    if not wrong:
        worst = max(each.rounded / each.moved if each.moved else 0.0 for each in compared)
        fine = f"the inputs of {count} products are rounded to int8; errors are {worst:.1e} of what rounding changes"
        return Products(Check(name=ACTIVATIONS, passed=True, detail=fine), True)
    if all(each.as_it_is <= each.allowed for each in compared):
        fine = f"onnxruntime has no int8 kernel for {count} products on this machine, and computes with float32"
        return Products(Check(name=ACTIVATIONS, passed=True, detail=fine), False)
    first = wrong[0]
    kept = ", but by its input as it is" if first.as_it_is <= first.allowed else ""
    detail = f"{first.name} is not multiplied by its input rounded to int8{kept}"
    return Products(Check(name=ACTIVATIONS, passed=False, detail=detail), True)


def _compared(bundle: Bundle, quantisation: Quantisation, seed: int) -> list[list[_Compared]]:
    """Errors of all products, in several positions at once and in one."""
    spec = bundle.manifest.graph
    values = require_format(bundle.manifest.format).product_values(bundle)
    several = layer_case(spec, seed)
    cases = several, replace(several, batch_size=1, sequence_length=1, mask="none")
    return [[_compare(product, quantisation) for product in values(case.inputs(spec))] for case in cases]


def _compare(product: Product, quantisation: Quantisation) -> _Compared:
    x, width = product.x, product.x.shape[-1]
    numbers_KN = quantisation.numbers(product.packed, width).astype(np.float64).T
    if numbers_KN.shape != (width, product.y.shape[-1]):  # blocks of another size than the manifest says
        return _Compared(product.name, *4 * [float("nan")])
    plain = x.astype(np.float64) @ numbers_KN
    rounded = rounded_activations(x, quantisation.block_size).astype(np.float64) @ numbers_KN
    floor = _FLOOR * epsilon("float32") * _size(plain)
    return _Compared(product.name, _size(product.y - rounded), _size(product.y - plain), _size(rounded - plain), floor)


def _size(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
