"""Bundles: one directory with the artifact, its weights, its report and a manifest that ties them together."""

from diffdeploy.bundle.manifest import Environment, FileDigest, Manifest, Provenance
from diffdeploy.bundle.store import Bundle, default_output, open_bundle, staged_bundle

__all__ = [
    "Bundle",
    "Environment",
    "FileDigest",
    "Manifest",
    "Provenance",
    "default_output",
    "open_bundle",
    "staged_bundle",
]
