"""Faults in the files of an AOTInductor package other than its library."""

import json
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from diffdeploy.formats.aoti.backend import MODEL
from diffdeploy.formats.aoti.constants import rewrite_member
from diffdeploy.formats.artifact import FileFault

__all__ = ["AOTI_FAULTS"]


def _edit_metadata(directory: Path, changes: Mapping[str, str]) -> None:
    """Change entries in all metadata files of a package."""
    path = directory / MODEL
    with zipfile.ZipFile(path) as package:
        members = [name for name in package.namelist() if name.endswith("_metadata.json")]
        said = {name: {**json.loads(package.read(name)), **changes} for name in members}
    for name, metadata in said.items():
        rewrite_member(path, name, json.dumps(metadata).encode())


def _edit_source(directory: Path, pattern: bytes, replacement: bytes) -> None:
    """Replace the first match in the source that the package was compiled from."""
    path = directory / MODEL
    with zipfile.ZipFile(path) as package:
        name = next(name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        source = package.read(name)
    rewrite_member(path, name, re.sub(pattern, replacement, source, count=1))


AOTI_FAULTS = [
    FileFault(
        name="aoti_package_of_other_weights",
        place="bundle",
        breaks="compiled from other weights, according to its metadata",
        edit=partial(_edit_metadata, changes={"weights_sha256": "0" * 64}),
    ),
    FileFault(
        name="aoti_package_of_one_attention",
        place="bundle",
        breaks="compiled from a graph that lacks one attention, according to its source",
        edit=partial(
            _edit_source,
            pattern=rb"(aoti_torch_\w*?)scaled_dot_product|(?<!void )\bcall_prefill(?=_\d+\()",
            replacement=rb"\1another_product",
        ),
    ),
]
