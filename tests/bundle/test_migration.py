"""Bundles of earlier schemas still open; what is damaged, or newer than this version, is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffdeploy import load
from diffdeploy.bundle import MANIFEST, Manifest, open_bundle
from diffdeploy.cli.main import main
from diffdeploy.errors import IntegrityError


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and sign it again as the version that wrote it would have."""
    fields = json.loads((bundle / MANIFEST).read_bytes())
    del fields["manifest_sha256"]
    change(fields)
    body = (json.dumps(fields, indent=2) + "\n").encode()
    fields["manifest_sha256"] = hashlib.sha256(body).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(fields, indent=2) + "\n")


@pytest.fixture
def first_schema(sample_bundle: Path, tmp_path: Path) -> Path:
    def earlier(fields: dict[str, Any]) -> None:
        fields["schema_version"] = 1
        del fields["requires"]

    copy = tmp_path / "bundle"
    shutil.copytree(sample_bundle, copy)
    rewrite(copy, earlier)
    return copy


def test_a_bundle_of_schema_1_opens_runs_and_verifies(first_schema: Path) -> None:
    bundle = open_bundle(first_schema)
    assert bundle.manifest.schema_version == 3
    assert bundle.manifest.requires is None
    assert bundle.manifest.options.attention_impl == "two_call"
    assert bundle.manifest.options.opset == 23
    with load(first_schema) as runtime:
        assert runtime(hidden_states=np.ones((1, 3, 128), np.float32))["output"].shape == (1, 3, 128)
    assert main(["verify", str(first_schema), "--cases", "quick"]) == 0


def test_a_bundle_of_schema_2_opens_and_runs(bundle_copy: Path) -> None:
    def earlier(fields: dict[str, Any]) -> None:
        fields["schema_version"] = 2
        del fields["requires"]

    rewrite(bundle_copy, earlier)
    assert open_bundle(bundle_copy).manifest.requires is None
    with load(bundle_copy) as runtime:
        assert runtime(hidden_states=np.ones((1, 3, 128), np.float32))["output"].shape == (1, 3, 128)


@pytest.mark.parametrize("schema", [0, 4, "1", None, True, 1.0], ids=str)
def test_other_schemas_are_refused(first_schema: Path, schema: Any) -> None:
    rewrite(first_schema, lambda fields: fields.update(schema_version=schema))
    with pytest.raises(IntegrityError, match=r"schema_version .*; accepted: 1, 2, 3"):
        open_bundle(first_schema)


def test_a_changed_byte_of_an_old_manifest_is_seen(first_schema: Path) -> None:
    path = first_schema / MANIFEST
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(IntegrityError, match="does not match its own digest"):
        open_bundle(first_schema)


def test_options_that_no_export_has_are_refused(first_schema: Path) -> None:
    rewrite(first_schema, lambda fields: fields["options"].update(speed="high"))
    with pytest.raises(IntegrityError, match="is not a manifest of diffdeploy"):
        open_bundle(first_schema)


def test_a_manifest_comes_back_as_it_was_written(sample_bundle: Path) -> None:
    data = (sample_bundle / MANIFEST).read_bytes()
    assert Manifest.from_bytes(data).to_bytes() == data
    assert json.loads(data)["requires"] == {"onnxruntime": "1.23.1"}
    assert json.loads(data)["options"] == {"attention_impl": "two_call", "seed": 0, "opset": 23, "flavor": "standard"}
