"""Bundles: one directory with the artifact, its weights, its report and a manifest that ties them together."""

from diffdeploy.bundle.block import eager_module, frozen_module
from diffdeploy.bundle.manifest import Environment, ExportRecord, FileDigest, Manifest, Provenance
from diffdeploy.bundle.signature import SIGNATURE, sign_bundle
from diffdeploy.bundle.special_tokens import SpecialTokens, special_tokens
from diffdeploy.bundle.store import (
    GOLDEN,
    MANIFEST,
    REPORT,
    WEIGHTS,
    Bundle,
    default_output,
    is_bundle,
    open_bundle,
    staged_bundle,
    write_manifest,
)
from diffdeploy.bundle.trust import is_own_export, remember_export
from diffdeploy.bundle.weights import cast_weights, read_weights

__all__ = [
    "GOLDEN",
    "MANIFEST",
    "REPORT",
    "SIGNATURE",
    "WEIGHTS",
    "Bundle",
    "Environment",
    "ExportRecord",
    "FileDigest",
    "Manifest",
    "Provenance",
    "SpecialTokens",
    "cast_weights",
    "default_output",
    "eager_module",
    "frozen_module",
    "is_bundle",
    "is_own_export",
    "open_bundle",
    "read_weights",
    "remember_export",
    "sign_bundle",
    "special_tokens",
    "staged_bundle",
    "write_manifest",
]
