"""Bundles: one directory with the artifact, its weights, its report and a manifest that ties them together."""

from diffdeploy.bundle.block import eager_module, frozen_module
from diffdeploy.bundle.manifest import Environment, ExportRecord, FileDigest, Manifest, Provenance
from diffdeploy.bundle.quantised import (
    BLOCK_SIZES,
    HEAD,
    Activations,
    Packed,
    Quantisation,
    WeightBits,
    dequantised,
    packed_weights,
    quantised,
    with_own_head,
)
from diffdeploy.bundle.signature import SIGNATURE, sign_bundle
from diffdeploy.bundle.special_tokens import SpecialTokens, special_tokens
from diffdeploy.bundle.store import (
    GOLDEN,
    MANIFEST,
    REPORT,
    WEIGHTS,
    Bundle,
    check_output,
    default_output,
    is_bundle,
    open_bundle,
    staged_bundle,
    write_manifest,
)
from diffdeploy.bundle.trust import is_own_export, remember_export
from diffdeploy.bundle.weights import cast_weights, read_tensors, read_weights

__all__ = [
    "BLOCK_SIZES",
    "GOLDEN",
    "HEAD",
    "MANIFEST",
    "REPORT",
    "SIGNATURE",
    "WEIGHTS",
    "Activations",
    "Bundle",
    "Environment",
    "ExportRecord",
    "FileDigest",
    "Manifest",
    "Packed",
    "Provenance",
    "Quantisation",
    "SpecialTokens",
    "WeightBits",
    "cast_weights",
    "check_output",
    "default_output",
    "dequantised",
    "eager_module",
    "frozen_module",
    "is_bundle",
    "is_own_export",
    "open_bundle",
    "packed_weights",
    "quantised",
    "read_tensors",
    "read_weights",
    "remember_export",
    "sign_bundle",
    "special_tokens",
    "staged_bundle",
    "with_own_head",
    "write_manifest",
]
