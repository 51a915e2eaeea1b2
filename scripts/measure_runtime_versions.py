"""Run small bundles in each released onnxruntime and in chosen versions of torch, and write the results as a page.

    python scripts/measure_runtime_versions.py FOLDER --output docs/runtime-versions.md
    python scripts/measure_runtime_versions.py FOLDER --onnxruntime 1.23.0 1.23.1 --torch 2.11.0 2.14.1

pip installs every version into a separate folder, which precedes this environment on the search path of the processes
that run the bundles. Bundles are exported here, with the torch of this environment, and the exact results and budgets
for the comparison are computed here, as in the verification.

Without a choice of versions, every onnxruntime that pip offers is tried, but no torch, since each takes gigabytes.
FOLDER keeps everything that was installed, exported and measured, so that an interrupted run can continue; after a
change of the exporters, give another folder. The exit code is 1 if a version that `Format.least_versions` admits
computes a bundle incorrectly.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from runtime_versions_page import Row, Verdict, page

from diffdeploy.bench.machine import Machine
from diffdeploy.bundle import open_bundle, read_weights, write_manifest
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.config import LAMBDA_VECTORS, AnyConfig, DiffAttentionConfig, DiffAttentionV2Config, RopeConfig
from diffdeploy.errors import ExportError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.formats import RunOptions, require_format
from diffdeploy.formats.onnx.format import OPSETS
from diffdeploy.graphs import DType, Variant
from diffdeploy.verify.run import run_case
from diffdeploy.verify.sweep import select_cases
from diffdeploy.verify.worker import ArtifactProcess
from diffdeploy.verify.yardsticks import RememberedYardsticks
from diffdeploy.versions import release

NUM_CASES = 60

GROUPED = DiffAttentionConfig(
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    # The flavor ort leaves the rotary embedding to onnxruntime only if the width is a multiple of 16.
    head_dim=16,
    lambda_init=0.5,
    output_scale=0.5,
    rope=RopeConfig(style="interleaved", theta=1e4),
)
BLOCKS: dict[str, AnyConfig] = {
    "grouped": GROUPED,
    "not grouped": replace(GROUPED, num_kv_heads=4),
    "window": replace(GROUPED, sliding_window=5),
    "not causal": replace(GROUPED, causal=False),
    "version 2": DiffAttentionV2Config(embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, rope=GROUPED.rope),
}
GRAPHS: tuple[Variant, ...] = ("plain", "masked", "cached")
OF_ORT: tuple[Variant, ...] = ("plain", "masked")
DTYPES: tuple[DType, ...] = ("float32", "float16")

# torch needs libraries that this environment may lack; those that onnxruntime needs are here, since it is installed.
PIP_OPTIONS = {"onnxruntime": ["--no-deps"], "torch": []}


class Subject(NamedTuple):
    """A bundle: the options of its export, and the name of its block in `BLOCKS`."""

    block: str
    options: ExportOptions

    @property
    def export(self) -> str:
        """Description of the export."""
        options = self.options
        flavor = [] if options.onnx_flavor in (None, "standard") else [options.onnx_flavor or ""]
        return ", ".join([options.format if options.opset is None else f"opset {options.opset}", *flavor])

    @property
    def name(self) -> str:
        """Description of the bundle, for a file name."""
        parts = (self.export, self.options.graph, self.block, self.options.dtype)
        return " ".join(parts).replace(",", "").replace(" ", "-")


def onnx_subjects() -> list[Subject]:
    chosen = [("grouped", graph, opset, "standard") for opset, graph in product(OPSETS, GRAPHS)]
    others = [block for block in BLOCKS if block != "grouped"]
    # The first opset with Attention, for which one version reads the wrong heads.
    chosen += [(block, graph, 23, "standard") for block, graph in product(others, GRAPHS)]
    blocks = ("grouped", "not grouped", "window")
    chosen += [(block, graph, opset, "ort") for opset, graph, block in product((20, 23, 24), OF_ORT, blocks)]
    return [
        Subject(block, small(ExportOptions(graph=graph, opset=opset, onnx_flavor=flavor, dtype=dtype)))
        for block, graph, opset, flavor in chosen
        for dtype in DTYPES
    ]


def torch_subjects() -> list[Subject]:
    chosen: list[tuple[str, Variant]] = [("grouped", graph) for graph in GRAPHS]
    chosen += [("window", "masked"), ("not causal", "plain"), ("version 2", "cached")]
    return [
        Subject(block, small(ExportOptions(format="pt2", graph=graph, dtype=dtype)))
        for block, graph in chosen
        for dtype in (*DTYPES, "bfloat16")
    ]


def small(options: ExportOptions) -> ExportOptions:
    return replace(options, max_batch_size=8, max_sequence_length=129)


def checkpoint(config: AnyConfig) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if name in LAMBDA_VECTORS else config.embed_dim**-0.5)
        for name, shape in config.weight_shapes().items()
    }
    if "subln.weight" in weights:
        weights["subln.weight"] += 1
    return Checkpoint(config=config, weights=weights, layout="none", layer=None, keys=list(weights))


def offered(package: str) -> list[str]:
    """Released versions for which pip has a build for this Python, the oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("Available versions: "))
    return sorted(line.removeprefix("Available versions: ").split(", "), key=release)


def install(package: str, version: str, folder: Path) -> Path:
    """Folder with that version, which is installed unless it exists."""
    target = folder / f"{package}-{version}"
    if not target.exists():
        print(f"installing {package} {version}", file=sys.stderr, flush=True)
        begun = target.with_suffix(f"{target.suffix}.begun")
        # pip would not replace the remains of an interrupted run.
        shutil.rmtree(begun, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", *PIP_OPTIONS[package], "--target", str(begun)]
        subprocess.run([*command, f"{package}=={version}"], check=True)
        begun.rename(target)
    return target


@contextmanager
def on_search_path(folder: Path) -> Iterator[None]:
    """Let processes that are started in the ``with`` block find the content of a folder before anything else."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def is_importable(package: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0


def export(subject: Subject, folder: Path) -> Path:
    path = folder / "bundles" / subject.name
    if not path.exists():
        export_bundle(checkpoint(BLOCKS[subject.block]), path, subject.options, verify=False)
        # No required versions are recorded, or versions that are too old would be refused.
        write_manifest(path, open_bundle(path).manifest.model_copy(update={"requires": {}}))
    return path


class Trial:
    """A bundle, with the exact results for its outputs.

    Args:
        path: directory of the bundle.
    """

    def __init__(self, path: Path) -> None:
        self.bundle = open_bundle(path)
        manifest = self.bundle.manifest
        exact = {name: array.astype(np.float64) for name, array in read_weights(self.bundle).items()}
        self.yardsticks = RememberedYardsticks(self.bundle, exact)
        self.cases = select_cases(NUM_CASES, manifest.config, manifest.graph, manifest.options.seed)

    def verdict(self, version: str) -> Verdict:
        """Verdict on the version that is on the search path."""
        with ArtifactProcess(self.bundle.path, RunOptions(threads=1)) as artifact:
            try:
                assert version in artifact.backend
            except ExportError as error:
                return Verdict("refuses", reason=str(error))
            reports = [run_case(case, self.bundle, artifact, self.yardsticks) for case in self.cases]
        worst = max(reports, key=lambda report: report.severity)
        return Verdict("ok", worst.severity) if worst.passed else Verdict("off", worst.severity, worst.failure)


def measure(package: str, subjects: Sequence[Subject], versions: Sequence[str], folder: Path) -> list[Row]:
    """Run what was not run before, and return a row for each bundle."""
    file = folder / f"{package}.json"
    known: dict[str, list[object]] = json.loads(file.read_text()) if file.exists() else {}
    paths = {version: install(package, version, folder) for version in versions}
    able = {}
    for version, path in paths.items():
        with on_search_path(path):
            able[version] = is_importable(package)
    rows = []
    for subject in subjects:
        path = export(subject, folder)
        trial = None
        for version in versions:
            key = f"{subject.name} {version}"
            if key in known:
                continue
            trial = trial or Trial(path)
            with on_search_path(paths[version]):
                found = trial.verdict(version) if able[version] else Verdict("no import")
            known[key] = list(found)
            print(f"{package} {key}: {found.cell} {found.reason}"[:200], file=sys.stderr, flush=True)
            file.write_text(json.dumps(known))
        manifest = open_bundle(path).manifest
        least = require_format(manifest.format).least_versions(manifest)[package]
        verdicts = {version: Verdict(*known[f"{subject.name} {version}"]) for version in versions}  # type: ignore[arg-type]
        options = subject.options
        rows.append(Row(subject.export, options.graph, subject.block, [options.dtype], verdicts, least))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--onnxruntime", nargs="*", metavar="VERSION", help="by default all that pip offers")
    parser.add_argument("--torch", nargs="*", metavar="VERSION", default=[])
    parser.add_argument("--output", type=Path, help="page to write; by default standard output")
    options = parser.parse_args()
    chosen = {
        "onnxruntime": (
            onnx_subjects(),
            offered("onnxruntime") if options.onnxruntime is None else options.onnxruntime,
        ),
        "torch": (torch_subjects(), options.torch),
    }
    folder = options.folder.absolute()
    rows_of = {
        package: measure(package, subjects, sorted(versions, key=release), folder)
        for package, (subjects, versions) in chosen.items()
        if versions
    }
    machine = Machine.current(dtype="float32", device="cpu", threads=1)
    measured = {
        # The folder's path is private to the machine.
        "arguments": " ".join("FOLDER" if given == str(options.folder) else given for given in sys.argv[1:]),
        "cases": NUM_CASES,
        "machine": machine.cpu,
        "python": machine.python,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    text = page(rows_of, measured)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)
    rows = [row for rows in rows_of.values() for row in rows if row.admitted]
    if rows:
        wrong = [f"{row.export}, {row.graph}, {row.block}, {row.dtypes}: {', '.join(row.admitted)}" for row in rows]
        raise SystemExit("\n".join(["wrong, although the format admits them:", *wrong]))


if __name__ == "__main__":
    main()
