"""The constants of an artifact, whatever its format: read by what they are, written in place."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.bundle import Manifest
from diffdeploy.config import LAMBDA_VECTORS, AnyConfig
from diffdeploy.exact import lambda_value, rope_tables

if TYPE_CHECKING:
    from diffdeploy.verify.faults.base import Subject

__all__ = ["expected_constants", "read_constants", "write_constants"]


class _Holder(Protocol):
    def read(self, directory: Path, expected: Mapping[str, Array]) -> set[str]: ...

    def write(self, directory: Path, expected: Mapping[str, Array], changes: Mapping[str, Array]) -> None: ...


# Formats without a row have no constants of their own that could be written.
_HOLDERS = {
    "onnx": "diffdeploy.verify.faults.formats.onnx",
    "pt2": "diffdeploy.verify.faults.formats.pt2",
    "aoti": "diffdeploy.verify.faults.formats.aoti",
}


def _holder(manifest: Manifest) -> _Holder:
    holder: Any = import_module(_HOLDERS[manifest.format])
    return holder  # type: ignore[no-any-return]  # a module stands for the protocol


def expected_constants(manifest: Manifest, weights: Mapping[str, Array]) -> dict[str, Array]:
    """What a right artifact can hold: weights in its dtype, and all numbers and tables in float64."""
    expected = {name: array for name, array in weights.items() if name not in LAMBDA_VECTORS}
    numbers = {name: np.asarray(value, np.float64) for name, value in _numbers(manifest.config, weights).items()}
    if manifest.config.rope is not None:
        length = manifest.graph.axes["sequence_length"].max
        cos, sin = rope_tables(manifest.config.rope, manifest.config.head_dim, length)
        numbers |= {"rope.cos": cos, "rope.sin": sin}
    return {**expected, **numbers}


def _numbers(config: AnyConfig, weights: Mapping[str, Array]) -> dict[str, float]:
    numbers = {"softmax_scale": config.head_dim**-0.5}
    if config.constant_lambda:
        numbers["lambda"] = lambda_value(config, weights)
    if config.norm_eps is not None:
        numbers |= {"norm_eps": config.norm_eps, "output_scale": config.output_scale}
    return numbers


def read_constants(directory: Path, manifest: Manifest, weights: Mapping[str, Array]) -> dict[str, Array]:
    """Those of `expected_constants` that are found in the artifact.

    Args:
        directory: of a right bundle.
        manifest: of that bundle.
        weights: canonical weights in the artifact's dtype.
    """
    if manifest.format not in _HOLDERS:
        return {}
    expected = expected_constants(manifest, weights)
    found = _holder(manifest).read(directory, expected)
    return {name: array for name, array in expected.items() if name in found}


def write_constants(subject: "Subject", changes: Mapping[str, Array]) -> None:
    """Put other constants into the artifact of a copy."""
    expected = expected_constants(subject.manifest, subject.weights)
    _holder(subject.manifest).write(subject.path, expected, changes)
