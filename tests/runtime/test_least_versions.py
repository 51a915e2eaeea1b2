"""A runtime that is too old to compute a bundle rightly is refused, with what is installed, needed and to be done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from diffdeploy import load
from diffdeploy.bundle import Manifest, open_bundle, write_manifest
from diffdeploy.cli.main import main
from diffdeploy.errors import IntegrityError, UnavailableError
from diffdeploy.formats import format_names
from diffdeploy.runtime import least_versions
from tests.support.bundles import FormatBundle

REFUSAL = (
    "onnxruntime 1.23.0 is installed, but this onnx bundle needs 1.23.1 or newer for correct results; "
    "pip install 'onnxruntime>=1.23.1'"
)


def pretend(monkeypatch: pytest.MonkeyPatch, package: Any, version: str) -> None:
    monkeypatch.setattr(package, "__version__", version)


def record(bundle: Path, requires: dict[str, str] | None) -> None:
    write_manifest(bundle, open_bundle(bundle).manifest.model_copy(update={"requires": requires}))


def test_an_older_onnxruntime_is_refused(sample_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_bundle(sample_bundle).manifest.requires == {"onnxruntime": "1.23.1"}
    pretend(monkeypatch, onnxruntime, "1.23.0")
    with pytest.raises(UnavailableError) as refused:
        load(sample_bundle)
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize("version", ["1.23.1", "1.24", "1.100.0", "1.23.1.dev20260101", "1.24.0rc1+cu130", "2.0.0"])
def test_the_least_version_and_newer_ones_load(
    version: str, sample_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, onnxruntime, version)
    load(sample_bundle).close()


def test_commands_exit_with_3(
    sample_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, onnxruntime, "1.23.0")
    for arguments in (["verify", str(sample_bundle)], ["verify", str(sample_bundle), "--golden"]):
        assert main([*arguments, "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["error"] == REFUSAL


def test_the_table_says_it_of_a_manifest_that_does_not(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(bundle_copy, None)
    pretend(monkeypatch, onnxruntime, "1.23.0")
    with pytest.raises(UnavailableError, match=r"needs 1\.23\.1 or newer"):
        load(bundle_copy)


def test_the_manifest_says_it_before_the_table(bundle_copy: Path) -> None:
    record(bundle_copy, {"onnxruntime": "99.1"})
    with pytest.raises(UnavailableError, match=r"needs 99\.1 or newer"):
        load(bundle_copy)


def test_the_reference_runtime_needs_no_onnxruntime(sample_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, onnxruntime, "1.23.0")
    with load(sample_bundle, runtime="reference") as runtime:
        assert runtime(hidden_states=np.ones((1, 3, 128), np.float32))["output"].shape == (1, 3, 128)


def test_an_older_torch_is_refused(format_bundle: FormatBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch, "2.10.1+cpu")
    with pytest.raises(UnavailableError, match=r"torch 2\.10\.1\+cpu is installed, .* pip install 'torch>=2\.11\.0'"):
        load(format_bundle("pt2"))


@pytest.mark.parametrize("requires", [{"antigravity": "1.0"}, {"onnxruntime": "1.23.1", "torch": "2.11.0"}], ids=str)
def test_no_other_package_is_looked_for(requires: dict[str, str], bundle_copy: Path) -> None:
    record(bundle_copy, requires)
    with pytest.raises(IntegrityError, match=r"which no export to format onnx writes"):
        load(bundle_copy)


@pytest.mark.parametrize("version", ["", "newest", "1.24.1; import os", "9" * 5000], ids=range(4))
def test_what_is_no_version_is_damage(version: str, bundle_copy: Path) -> None:
    manifest = open_bundle(bundle_copy).manifest
    damaged = Manifest.model_construct(**{**dict(manifest), "requires": {"onnxruntime": version}})
    (bundle_copy / "manifest.json").write_bytes(damaged.to_bytes())
    with pytest.raises(IntegrityError, match="is not a manifest of diffdeploy"):
        open_bundle(bundle_copy)


def test_inspect_shows_it(sample_bundle: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(bundle_copy, None)
    for bundle in (sample_bundle, bundle_copy):
        assert main(["inspect", str(bundle)]) == 0
        assert "onnxruntime 1.23.1 or newer" in capsys.readouterr().out
        assert main(["inspect", str(bundle), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["requires"] == {"onnxruntime": "1.23.1"}


def test_a_format_that_this_version_does_not_know_requires_nothing(sample_bundle: Path) -> None:
    manifest = open_bundle(sample_bundle).manifest.model_copy(update={"requires": None, "format": "newer"})
    assert manifest.format not in format_names()
    assert least_versions(manifest) == {}
