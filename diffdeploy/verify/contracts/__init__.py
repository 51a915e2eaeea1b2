"""Contracts: what must hold of an artifact's structure, read from the artifact itself. One module per format."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from diffdeploy.bundle import Bundle
from diffdeploy.verify.report import Check, GraphFacts

__all__ = ["Contract", "examine"]

Array = np.ndarray[Any, np.dtype[Any]]
Contract = Callable[[Bundle, Mapping[str, Array]], tuple[GraphFacts, list[Check]]]

_CONTRACTS = {"onnx": "diffdeploy.verify.contracts.onnx"}


def examine(bundle: Bundle, weights: Mapping[str, Array]) -> tuple[GraphFacts, list[Check]]:
    """Read the artifact and check it against the bundle's manifest and weights.

    Args:
        bundle: an opened bundle.
        weights: canonical weights in the artifact's dtype.
    """
    contract: Contract = import_module(_CONTRACTS[bundle.manifest.format]).examine
    return contract(bundle, weights)
