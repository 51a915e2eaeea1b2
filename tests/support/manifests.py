"""Manifests and reports with changed contents and new digests, as anybody who changes a bundle can write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdeploy.bundle import MANIFEST, Manifest, open_bundle, write_manifest
from diffdeploy.bundle.manifest import _digest, _render
from diffdeploy.verify.report import files_judged

__all__ = ["accept", "fields_of", "reached", "set_to", "signed", "signed_again", "with_report"]


def fields_of(bundle: Path) -> dict[str, Any]:
    """Fields of the manifest of a bundle."""
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    return found


def signed_again(bundle: Path, fields: dict[str, Any]) -> None:
    """Write a manifest with these fields, whatever they are, and with their digest."""
    fields = {name: value for name, value in fields.items() if name != "manifest_sha256"}
    (bundle / MANIFEST).write_bytes(_render({**fields, "manifest_sha256": _digest(fields)}))


def reached(node: Any, path: tuple[Any, ...]) -> Any:
    """Value at a path of keys and indices."""
    for key in path:
        node = node[key]
    return node


def set_to(bundle: Path, path: tuple[Any, ...], value: Any) -> None:
    """Write another value into one field of a manifest."""
    fields = fields_of(bundle)
    reached(fields, path[:-1])[path[-1]] = value
    signed_again(bundle, fields)


def signed(bundle: Path) -> Path:
    """Write the digests of a bundle's current files into its manifest, and return the bundle."""
    write_manifest(bundle, Manifest.from_bytes((bundle / MANIFEST).read_bytes()))
    return bundle


def with_report(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the report of a bundle, and update the digests in the manifest."""
    report = bundle / "verification.json"
    fields = json.loads(report.read_bytes())
    change(fields)
    report.write_text(json.dumps(fields))
    signed(bundle)


def accept(bundle: Path) -> Path:
    """Make the report of a bundle refer to the current files, and return the bundle."""
    files = files_judged(open_bundle(bundle).manifest)
    with_report(bundle, lambda report: report.update(files=files))
    return bundle
