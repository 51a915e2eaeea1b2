"""From the options of ``diffdeploy bench`` to a run: its plan, and the bundles that are exported for it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffdeploy.cli import console
from diffdeploy.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from diffdeploy.bench import Bench, Candidate, Plan, Size
    from diffdeploy.bench.subject import Subject
    from diffdeploy.graphs import DType, Variant

__all__ = ["Request", "names", "numbers", "prepare"]

_LENGTHS = (128, 512, 2048)
_PASTS = (128, 512, 2048, 8192, 32768)
_ONNX_ORT = "onnx-ort"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that say what is measured, as they were given; lists are split at their commas."""

    sources: tuple[Path, ...]
    impl: Sequence[str]
    format: Sequence[str] | None
    seq: Sequence[int] | None
    batch: Sequence[int]
    embed_dim: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    dtype: "DType | None"
    device: str
    threads: int | None
    graph: "Variant | None"
    baseline: str | None
    rounds: int | None
    layout: str | None
    layer: int | None
    depth: int | None
    rope: Literal["interleaved", "half", "none"] | None
    rope_theta: float | None
    gqa_layout: Literal["canonical", "legacy"] | None

    @property
    def command(self) -> str:
        """The command that measures the same again."""
        usual = {"impl": ["all"], "batch": [1], "device": "cpu"}
        words = ["diffdeploy", "bench", *map(str, self.sources)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value not in (None, usual.get(field.name)):
                words += [
                    f"--{field.name.replace('_', '-')}",
                    ",".join(map(str, value)) if isinstance(value, list) else str(value),
                ]
        return " ".join(words)


@contextmanager
def prepare(request: Request, stage: Callable[[str], None]) -> "Iterator[Bench]":
    """A run with everything that it needs; the exports made for it are removed at the end of the block.

    Args:
        request: the options.
        stage: called with a few words when something begins that takes a while.

    Raises:
        InputError: options that do not fit each other, or a file that cannot be read.
        UnavailableError: this machine lacks a device, a package or the memory.
        ExportError: a format could not be exported.
    """
    from diffdeploy.bench import Bench
    from diffdeploy.bench.estimate import require_memory
    from diffdeploy.bench.machine import free_bytes

    _set_up_torch(request)
    subject = _subject(request)
    with tempfile.TemporaryDirectory(prefix="diffdeploy-bench-") as folder:
        plan = _plan(request, subject, Path(folder))
        require_memory(plan, free_bytes(plan.device))
        _write_weights(subject, plan)
        plan = _with_exports(plan, request, subject, stage)
        stage("starting")
        yield Bench(plan, subject.block, request.command)


def _set_up_torch(request: Request) -> None:
    import torch

    if request.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("--device is cuda, and torch finds no CUDA device here; use --device cpu")
    if request.threads is not None:
        torch.set_num_threads(request.threads)  # AOTInductor compiles the number in


def _subject(request: Request) -> "Subject":
    from diffdeploy.bench.subject import RandomSizes, read_subject
    from diffdeploy.checkpoints import CheckpointOptions

    reading = CheckpointOptions(
        layout=request.layout,
        layer=request.layer,
        depth=request.depth,
        rope=request.rope,
        rope_theta=request.rope_theta,
        gqa_layout=request.gqa_layout,
    )
    sizes = RandomSizes(
        embed_dim=request.embed_dim,
        num_heads=request.num_heads,
        num_kv_heads=request.num_kv_heads,
        head_dim=request.head_dim,
    )
    return read_subject(request.sources, reading, sizes)


def _plan(request: Request, subject: "Subject", folder: Path) -> "Plan":
    import torch

    from diffdeploy.bench import Plan
    from diffdeploy.bench.choices import choose_baseline, eager_candidates, given_candidates

    graph, dtype, device = subject.graph(request.graph), subject.dtype(request.dtype), request.device
    sizes = _sizes(graph, request, subject.longest)
    formats = request.format or (["none"] if subject.bundles else ["all"])
    candidates = (
        *eager_candidates(request.impl, subject.checkpoint.config, device=device, dtype=dtype, graph=graph),
        *given_candidates(subject, sizes, device),
        *_export_candidates(request, formats, graph, dtype, folder),
    )
    return Plan(
        config=subject.checkpoint.config,
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


def _sizes(graph: "Variant", request: Request, longest: int | None) -> "tuple[Size, ...]":
    """In ascending order, so that what takes longest comes last; by default none that bundles are not made for."""
    from diffdeploy.bench import Size

    cached = graph == "cached"
    usual = _PASTS if cached else _LENGTHS
    most = usual[-1] if longest is None else longest - cached
    lengths = request.seq or [length for length in usual if length <= most] or [most]
    return tuple(
        Size(
            batch_size=batch_size,
            sequence_length=1 if cached else length,
            past_sequence_length=length if cached else 0,
        )
        for batch_size in sorted(set(request.batch))
        for length in sorted(set(lengths))
    )


def _format_names() -> list[str]:
    """Of everything that can be exported; the flavors of ONNX are told apart."""
    from diffdeploy.exporters.base import FORMATS

    return [name for each in FORMATS for name in ((each, _ONNX_ORT) if each == "onnx" else (each,))]


def _export_candidates(
    request: Request, formats: Sequence[str], graph: "Variant", dtype: "DType", folder: Path
) -> "list[Candidate]":
    """Those of the formats that this machine can export and run; one that was named must be able to."""
    from diffdeploy.bench import Candidate
    from diffdeploy.bench.choices import choose_names
    from diffdeploy.exporters import why_not_export
    from diffdeploy.ops import Impl, resolve_impl
    from diffdeploy.runtime import why_not_run

    candidates = []
    for name in choose_names("format", formats, _format_names()):
        base = name.removesuffix("-ort")
        reason = why_not_export(base, request.device, dtype) or why_not_run(base, request.device, dtype)
        if reason is None:
            impl = Impl.PADDED if name == _ONNX_ORT else resolve_impl("auto", target=base, graph=graph)
            called = f"{name}-bundle" if name in list(Impl) else name
            candidates.append(Candidate(name=called, format=name, bundle=folder / name, bundle_impl=impl))
        elif list(formats) == ["all"]:
            console.note(f"{name} is left out: {reason}")
        else:
            raise UnavailableError(reason)
    return candidates


def _with_exports(plan: "Plan", request: Request, subject: "Subject", stage: Callable[[str], None]) -> "Plan":
    """Export what is in the plan; of ``all`` formats those are left out that cannot hold this block."""
    from diffdeploy.bench.choices import choose_baseline

    candidates = []
    for candidate in plan.candidates:
        if candidate.bundle is not None and candidate.bundle.parent == plan.weights.parent:
            stage(f"exporting {candidate.name}")
            try:
                _export(subject, candidate, plan)
            except (InputError, UnavailableError) as error:
                if request.format not in (None, ["all"]):
                    raise
                console.note(f"{candidate.name} is left out: {error}")
                continue
        candidates.append(candidate)
    baseline = choose_baseline(request.baseline, candidates)
    return plan.model_copy(update={"candidates": tuple(candidates), "baseline": baseline})


def _write_weights(subject: "Subject", plan: "Plan") -> None:
    from safetensors.torch import save_file

    from diffdeploy.exporters.base import cast_weights

    save_file(cast_weights(subject.checkpoint, plan.dtype), plan.weights)


def _export(subject: "Subject", candidate: "Candidate", plan: "Plan") -> None:
    """Without the verification of an export, since every candidate is checked at the very sizes that it is timed at."""
    from diffdeploy.exporters import ExportOptions, export_bundle

    assert candidate.bundle is not None
    assert candidate.format is not None
    options = ExportOptions(
        format=candidate.format.removesuffix("-ort"),
        onnx_flavor="ort" if candidate.format == _ONNX_ORT else None,
        device="cuda" if plan.device == "cuda" else "cpu",
        graph=plan.graph,
        dtype=plan.dtype,
        max_batch_size=max(2, *(size.batch_size for size in plan.sizes)),
        max_sequence_length=max(4, plan.max_positions),
    )
    export_bundle(subject.checkpoint, candidate.bundle, options, verify=False)


def numbers(option: str, text: str) -> list[int]:
    """Positive integers with commas between them.

    Raises:
        InputError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} is {text!r}; accepted are positive integers with commas between them")
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",")]
