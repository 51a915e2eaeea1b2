"""Bundles that many tests share, exported only once for all processes of a run and for all runs of the same code."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffdeploy.checkpoints import Checkpoint, ModelCheckpoint
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.files import file_sha256
from diffdeploy.runtime.machine import this_machine
from tests.support.paths import ROOT

CPU_FORMATS = ["onnx", "onnx-ort", "pt2", "aoti", "compile"]

# For bundles of small models. Tests of several rooms export the sample with it, and share the bundle.
SMALL_MODEL = ExportOptions(graph="model", max_batch_size=4, max_sequence_length=48, cases="quick")
# Engines and browsers are asked for more tokens.
ENGINE_MODEL = replace(SMALL_MODEL, max_sequence_length=72, cases=1)

FormatBundle = Callable[[str], Path]

_DAY_S = 24 * 60 * 60


def options_of(name: str, **changes: object) -> ExportOptions:
    """Options for small bundles of a format, which is given by its name in `CPU_FORMATS`."""
    format_name, _, flavor = name.partition("-")
    options = ExportOptions(
        format=format_name, onnx_flavor=flavor or None, max_batch_size=4, max_sequence_length=70, cases="quick"
    )
    return replace(options, **changes)  # type: ignore[arg-type]


class BundleCache:
    """Cache of bundles by everything that they depend on: block, options, source, versions, compiler and machine.

    Args:
        folder: folder that all processes share; bundles that other code left there are removed after a day.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _surroundings()
        self._folder.mkdir(parents=True, exist_ok=True)
        os.utime(self._folder)
        for other in folder.iterdir():
            if time.time() - other.stat().st_mtime > _DAY_S:
                shutil.rmtree(other, ignore_errors=True)
        self._lent: set[Path] = set()

    def bundle(self, checkpoint: Checkpoint | ModelCheckpoint, options: ExportOptions, *, verify: bool = True) -> Path:
        """A bundle as `export_bundle` makes it. It is shared, so copy it before you change it."""
        whole = hashlib.sha256(safetensors.torch.save({n: t.contiguous() for n, t in checkpoint.weights.items()}))
        for part in (replace(checkpoint, weights={}), options, verify, torch.get_num_threads()):
            whole.update(repr(part).encode())
        folder = self._folder / whole.hexdigest()[:16]
        path = folder / "bundle"
        if path not in self._lent:
            folder.mkdir(exist_ok=True)
            with _locked(folder / "lock"):
                if not _is_intact(path):
                    shutil.rmtree(path, ignore_errors=True)
                    export_bundle(checkpoint, path, options, verify=verify)
                    _record_of(path).write_text(json.dumps(_digests(path)))
            self._lent.add(path)
        return path

    def changed(self) -> list[Path]:
        """Bundles that a test was given and changed."""
        return [path for path in self._lent if not _is_intact(path)]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _record_of(path: Path) -> Path:
    return path.with_name("digests.json")


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file_sha256(file) for file in files}


def _is_intact(path: Path) -> bool:
    record = _record_of(path)
    return record.is_file() and json.loads(record.read_text()) == _digests(path)


@cache
def _surroundings() -> str:
    """Digest of everything that a bundle depends on besides its block and options."""
    whole = hashlib.sha256()
    for folder in ("diffdeploy", "exporters"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            whole.update(f"{file.relative_to(ROOT)} {file_sha256(file)}\n".encode())
    versions = sorted((found.name, found.version) for found in metadata.distributions())
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    said = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout if compiler else b""
    whole.update(repr((versions, said, this_machine("cpu"))).encode())
    return whole.hexdigest()[:16]


def cache_folder(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in pytest's cache or, if that is switched off, among the temporary files of this process."""
    kept: pytest.Cache | None = getattr(config, "cache", None)
    return kept.mkdir("bundles") if kept else tmp_path_factory.mktemp("bundles")
