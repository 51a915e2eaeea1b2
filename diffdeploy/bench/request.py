"""Preparation of a benchmark from the user's request: its plan, and the bundles that are exported for it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from diffdeploy.bench.block_source import BlockSource, RandomSizes, open_sources
from diffdeploy.bench.candidate_choice import (
    choose_baseline,
    choose_names,
    eager_candidates,
    given_candidates,
)
from diffdeploy.bench.changes import require_comparable
from diffdeploy.bench.estimate import require_memory
from diffdeploy.bench.machine import set_up_torch
from diffdeploy.bench.plan import Candidate, Plan, Size
from diffdeploy.bench.results import BenchReport
from diffdeploy.bench.run import Bench
from diffdeploy.bundle import cast_weights
from diffdeploy.checkpoints import CheckpointOptions
from diffdeploy.errors import InputError, UnavailableError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.formats import Device, RunOptions, Target, export_targets
from diffdeploy.graphs import DType, Variant
from diffdeploy.ops import Impl
from diffdeploy.runtime.machine import free_bytes

__all__ = ["BenchRequest", "prepare"]

_LENGTHS = (128, 512, 2048)
_PASTS = (128, 512, 2048, 8192, 32768)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The options that define a measurement, as they were given; see ``diffdeploy bench --help``."""

    sources: tuple[Path, ...]
    impl: Sequence[str]
    format: Sequence[str] | None
    seq: Sequence[int] | None
    batch: Sequence[int]
    embed_dim: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    dtype: DType | None
    device: Device
    threads: int | None
    graph: Variant | None
    baseline: str | None
    rounds: int | None
    reading: CheckpointOptions
    # None rather than False, which would become an option of the command that repeats the measurement.
    trust: Literal[True] | None = None
    public_key: Path | None = None

    @property
    def command(self) -> str:
        """Command that repeats the measurement."""
        usual = {"impl": ["all"], "batch": [1], "device": "cpu"}
        words = ["diffdeploy", "bench", *map(str, self.sources)]
        # The sources are arguments, which come first; the options for reading the checkpoint are added below.
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:] if field.name != "reading"}
        for name, value in {**given, **self.reading.given()}.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif value not in (None, usual.get(name)):
                words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        return " ".join(words)


@contextmanager
def prepare(
    request: BenchRequest, phase: Say, note: Say, *, compare_with: BenchReport | None = None
) -> Iterator[Bench]:
    """Prepare a run with everything that it needs; bundles exported for it are removed after the ``with`` block.

    Args:
        request: the user's request.
        phase: callback that receives a few words when a longer step begins.
        note: callback that receives what is left out, and why.
        compare_with: an earlier run to compare the result with.

    Raises:
        InputError: options contradict each other, a file cannot be read, or the runs cannot be compared.
        UnavailableError: this machine lacks a device, a package or memory.
        ExportError: a format could not be exported.
    """
    set_up_torch(request.device, request.threads)
    source = _source(request)
    with tempfile.TemporaryDirectory(prefix="diffdeploy-bench-") as folder:
        dtype = source.dtype(request.dtype)
        # First, since an unknown name must be refused before anything is printed.
        eager = eager_candidates(request.impl, source.checkpoint.config, device=request.device, dtype=dtype)
        targets = _targets(request, source, dtype, note)
        plan = _plan(request, source, eager, targets, Path(folder))
        # Before the exports, which take minutes.
        require_memory(plan, free_bytes(plan.device))
        if compare_with is not None:
            require_comparable(compare_with, plan, source.block)
        _write_weights(source, plan)
        plan = _with_exports(plan, request, source, targets, phase, note)
        phase("starting")
        yield Bench(plan, source.block, request.command)


def _source(request: BenchRequest) -> BlockSource:
    sizes = RandomSizes(
        embed_dim=request.embed_dim,
        num_heads=request.num_heads,
        num_kv_heads=request.num_kv_heads,
        head_dim=request.head_dim,
    )
    return open_sources(request.sources, request.reading, sizes, request.public_key)


def _targets(request: BenchRequest, source: BlockSource, dtype: DType, note: Say) -> dict[str, Target]:
    """Formats to export, by the names of their candidates; a format that was named must be able to run here."""
    asked = request.format or (["none"] if source.bundles else ["all"])
    known = export_targets()
    targets = {}
    for name in choose_names("format", asked, known):
        found = known[name].format
        reason = found.why_not_export(request.device, dtype) or found.why_not_run(request.device, dtype)
        if reason is None:
            # An implementation of the eager block may have the name of a format.
            targets[f"{name}-bundle" if name in list(Impl) else name] = known[name]
        elif list(asked) == ["all"]:
            note(f"{name} is left out: {reason}")
        else:
            raise UnavailableError(reason)
    return targets


def _plan(
    request: BenchRequest, source: BlockSource, eager: Sequence[Candidate], targets: dict[str, Target], folder: Path
) -> Plan:
    import torch

    graph, dtype, device = source.graph(request.graph), source.dtype(request.dtype), request.device
    sizes = _sizes(graph, request, source.longest)
    candidates = (
        *eager,
        *given_candidates(source, sizes, RunOptions(device=device, trust=bool(request.trust))),
        *(
            Candidate(
                name=name,
                format=target.name,
                bundle=folder / target.name,
                bundle_impl=target.format.fastest_impl(
                    _export_options(target, graph, dtype, device), source.checkpoint.config
                ),
            )
            for name, target in targets.items()
        ),
    )
    return Plan(
        config=source.checkpoint.config,
        weights=folder / "weights.safetensors",
        graph=graph,
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        sizes=sizes,
        candidates=candidates,
        baseline=choose_baseline(request.baseline, candidates),
        rounds=request.rounds,
    )


def _sizes(graph: Variant, request: BenchRequest, longest: int | None) -> tuple[Size, ...]:
    """Sizes in ascending order, so that the longest come last; by default only those that bundles support."""
    cached = graph == "cached"
    usual = _PASTS if cached else _LENGTHS
    # The decoded token uses one of the positions of a bundle.
    most = usual[-1] if longest is None else longest - cached
    lengths = request.seq or [length for length in usual if length <= most] or [most]
    return tuple(
        Size.of_length(length, batch_size=batch_size, graph=graph)
        for batch_size in sorted(set(request.batch))
        for length in sorted(set(lengths))
    )


def _with_exports(
    plan: Plan, request: BenchRequest, source: BlockSource, targets: dict[str, Target], phase: Say, note: Say
) -> Plan:
    """Export the formats in the plan; with ``all``, formats that do not support this block are left out."""
    candidates = []
    for candidate in plan.candidates:
        if (
            candidate.bundle is not None
            and candidate.name in targets
            # A bundle that was given may have the name of a format.
            and candidate.bundle.parent == plan.weights.parent
        ):
            phase(f"exporting {candidate.name}")
            try:
                _export(source, candidate.bundle, targets[candidate.name], plan)
            except (InputError, UnavailableError) as error:
                if request.format not in (None, ["all"]):
                    raise
                note(f"{candidate.name} is left out: {error}")
                continue
        candidates.append(candidate)
    # Chosen again, since the baseline may be among those left out.
    baseline = choose_baseline(request.baseline, candidates)
    return plan.model_copy(update={"candidates": tuple(candidates), "baseline": baseline})


def _write_weights(source: BlockSource, plan: Plan) -> None:
    from safetensors.torch import save_file

    save_file(cast_weights(source.checkpoint.weights, plan.dtype), plan.weights)


def _export(source: BlockSource, output: Path, target: Target, plan: Plan) -> None:
    """Export without verification, since every candidate is checked at the sizes at which it is timed."""
    device: Device = "cuda" if plan.device == "cuda" else "cpu"
    options = replace(
        _export_options(target, plan.graph, plan.dtype, device),
        max_batch_size=plan.max_batch_size,
        max_sequence_length=plan.max_sequence_length,
    )
    export_bundle(source.checkpoint, output, options, verify=False)


def _export_options(target: Target, graph: Variant, dtype: DType, device: Device) -> ExportOptions:
    return ExportOptions(format=target.format.name, onnx_flavor=target.flavor, device=device, graph=graph, dtype=dtype)
