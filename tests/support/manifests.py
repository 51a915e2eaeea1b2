"""Manifests and reports that say something else, signed anew, as anybody can who changes a bundle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdeploy.bundle import MANIFEST, Manifest, open_bundle, write_manifest
from diffdeploy.bundle.manifest import _digest, _render
from diffdeploy.verify.report import files_judged

__all__ = ["accept", "fields_of", "reached", "set_to", "signed", "signed_again", "with_report"]


def fields_of(bundle: Path) -> dict[str, Any]:
    """What the manifest of a bundle says."""
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_bytes())
    return found


def signed_again(bundle: Path, fields: dict[str, Any]) -> None:
    """Write a manifest of these fields, whatever they are."""
    fields = {name: value for name, value in fields.items() if name != "manifest_sha256"}
    (bundle / MANIFEST).write_bytes(_render({**fields, "manifest_sha256": _digest(fields)}))


def reached(node: Any, path: tuple[Any, ...]) -> Any:
    """What stands at a path of keys and places."""
    for key in path:
        node = node[key]
    return node


def set_to(bundle: Path, path: tuple[Any, ...], value: Any) -> None:
    """Write another value into one field of a manifest."""
    fields = fields_of(bundle)
    reached(fields, path[:-1])[path[-1]] = value
    signed_again(bundle, fields)


def signed(bundle: Path) -> Path:
    """A bundle with the digests of the files that it holds now."""
    write_manifest(bundle, Manifest.from_bytes((bundle / MANIFEST).read_bytes()))
    return bundle


def with_report(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let the report of a bundle say something else."""
    report = bundle / "verification.json"
    fields = json.loads(report.read_bytes())
    change(fields)
    report.write_text(json.dumps(fields))
    signed(bundle)


def accept(bundle: Path) -> Path:
    """A bundle whose report is of what it holds now."""
    files = files_judged(open_bundle(bundle).manifest)
    with_report(bundle, lambda report: report.update(files=files))
    return bundle
