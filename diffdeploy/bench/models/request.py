"""Preparation of a benchmark of models from the user's request."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal

from diffdeploy.bench.candidate_choice import choose_baseline
from diffdeploy.bench.machine import set_up_torch
from diffdeploy.bench.models.plan import NEW_TOKENS, ModelCandidate, ModelPlan, ModelSize, What
from diffdeploy.bench.models.results import Model
from diffdeploy.bench.models.run import ModelBench
from diffdeploy.bundle import WEIGHTS, Bundle, is_bundle, open_bundle
from diffdeploy.config import DecoderConfig
from diffdeploy.errors import InputError
from diffdeploy.formats import Device, RunOptions
from diffdeploy.ops import Impl
from diffdeploy.runtime import require_runnable, require_trusted
from diffdeploy.verify.checkpoint_match import matches_checkpoint

__all__ = ["ModelBenchRequest", "holds_models", "prepare_models"]

Say = Callable[[str], None]

_PROMPTS, _PASTS = (128, 512), (128, 1024, 4096)
# Implementations of attention in transformers.
_ATTENTIONS = ("sdpa", "eager")


def holds_models(sources: Sequence[Path]) -> bool:
    """True if a bundle of a whole model is among the sources."""
    return any(isinstance(open_bundle(path).manifest.config, DecoderConfig) for path in sources if is_bundle(path))


@dataclass(frozen=True, kw_only=True)
class ModelBenchRequest:
    """The options that define a measurement, as they were given; see ``diffdeploy bench --help``."""

    sources: tuple[Path, ...]
    impl: Sequence[str]
    seq: Sequence[int] | None
    batch: Sequence[int]
    device: Device
    threads: int | None
    baseline: str | None
    rounds: int | None
    trust: Literal[True] | None = None
    public_key: Path | None = None

    @property
    def command(self) -> str:
        """Command that repeats the measurement."""
        words = ["diffdeploy", "bench", *map(str, self.sources)]
        for option, value, usual in (
            ("--impl", ",".join(self.impl), "all"),
            ("--seq", None if self.seq is None else ",".join(map(str, self.seq)), None),
            ("--batch", ",".join(map(str, self.batch)), "1"),
            ("--device", self.device, "cpu"),
            ("--threads", self.threads, None),
            ("--baseline", self.baseline, None),
            ("--rounds", self.rounds, None),
            ("--public-key", self.public_key, None),
        ):
            if value is not None and value != usual:
                words += [option, str(value)]
        return " ".join([*words, *(["--trust"] if self.trust else [])])


def prepare_models(request: ModelBenchRequest, note: Say) -> ModelBench:
    """Prepare a run of the bundles and of the candidates for comparison.

    Args:
        request: the user's request.
        note: callback that receives what is left out, and why.

    Raises:
        InputError: the sources do not hold one model, or a bundle does not support a length.
        IntegrityError: a bundle is damaged, or not trusted.
        UnavailableError: a bundle cannot be run here.
    """
    import torch

    set_up_torch(request.device, request.threads)
    bundles = [open_bundle(path, request.public_key) for path in request.sources if is_bundle(path)]
    checkpoints = [path for path in request.sources if not is_bundle(path)]
    if len(checkpoints) > 1:
        raise InputError(
            f"{checkpoints[0]} and {checkpoints[1]} are two checkpoints; give one, and bundles made from it"
        )
    config = _agreed(bundles)
    candidates = [_of_bundle(bundle, bundles, request) for bundle in bundles]
    candidates += [
        ModelCandidate(name=f"eager-{impl}", kind="eager", choice=impl) for impl in _implementations(request.impl)
    ]
    candidates += _of_transformers(checkpoints, bundles[0], note)
    plan = ModelPlan(
        config=config,
        bundle=bundles[0].path.absolute(),
        dtype=bundles[0].manifest.graph.dtype,
        device=request.device,
        threads=torch.get_num_threads(),
        sizes=_sizes(request, bundles),
        candidates=tuple(candidates),
        baseline=_baseline(request.baseline, candidates),
        rounds=request.rounds,
    )
    return ModelBench(plan, _described(config, bundles[0].path.name), request.command)


def _agreed(bundles: Sequence[Bundle]) -> DecoderConfig:
    """Model that all bundles hold, in one dtype."""
    first = bundles[0]
    for bundle in bundles:
        config = bundle.manifest.config
        if not isinstance(config, DecoderConfig):
            raise InputError(f"{bundle.path} holds a block, but {first.path} holds a model; measure them separately")
        if config != first.manifest.config or bundle.manifest.files[WEIGHTS] != first.manifest.files[WEIGHTS]:
            raise InputError(
                f"{bundle.path} does not hold the model of {first.path} in the same dtype; measure them separately"
            )
    config = first.manifest.config
    assert isinstance(config, DecoderConfig)
    return config


def _of_bundle(bundle: Bundle, bundles: Sequence[Bundle], request: ModelBenchRequest) -> ModelCandidate:
    options = RunOptions(device=request.device, trust=bool(request.trust))
    require_runnable(bundle.manifest, options)
    require_trusted(bundle, options)
    # Bundles of the same name in different folders are distinguished by their paths.
    alone = [other.path.name for other in bundles].count(bundle.path.name) == 1
    return ModelCandidate(
        name=bundle.path.name if alone else str(bundle.path),
        kind="bundle",
        choice=bundle.manifest.format,
        path=bundle.path.absolute(),
    )


def _implementations(given: Sequence[str]) -> list[str]:
    """Implementations of the eager model: by default the one that the library chooses for each size."""
    if list(given) in (["all"], ["none"]):
        return [Impl.AUTO.value] if list(given) == ["all"] else []
    for name in given:
        if name not in list(Impl):
            raise InputError(f"implementation {name!r} is not known; accepted: {', '.join(Impl)}, all or none")
    return list(dict.fromkeys(given))


def _of_transformers(checkpoints: Sequence[Path], bundle: Bundle, note: Say) -> list[ModelCandidate]:
    """Candidates for transformers' own model of a DiffLlama directory, with both of its attention implementations."""
    if not checkpoints:
        note("transformers is left out: no checkpoint is given; give the DiffLlama directory that was exported")
        return []
    (path,) = checkpoints
    if find_spec("transformers") is None:
        note("transformers is left out: it is not installed; pip install 'diffdeploy[hf]'")
        return []
    if _model_type(path) != "diffllama":
        note(f"transformers is left out: {path} is not a directory of a DiffLlama model, which it needs")
        return []
    _require_same(path, bundle)
    if bundle.manifest.options.quantisation is not None:
        note("transformers is left out: it would compute with the original weights, not the quantised ones")
        return []
    return [
        ModelCandidate(name=f"transformers-{name}", kind="transformers", choice=name, path=path.absolute())
        for name in _ATTENTIONS
    ]


def _model_type(path: Path) -> str | None:
    try:
        fields = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return fields.get("model_type") if isinstance(fields, dict) else None


def _require_same(path: Path, bundle: Bundle) -> None:
    if not matches_checkpoint(bundle.path, path).passed:
        raise InputError(f"{bundle.path} does not hold the model of {path}; measure them in separate runs")


def _sizes(request: ModelBenchRequest, bundles: Sequence[Bundle]) -> tuple[ModelSize, ...]:
    """Sizes for prefill, then for decoding, in ascending order; by default those that all bundles support."""
    axes = [bundle.manifest.graph.axes for bundle in bundles]
    capacity = min(each["total_sequence_length"].max for each in axes)
    most_rows = min(each["batch_size"].max for each in axes)
    if max(request.batch) > most_rows:
        raise InputError(f"the bundles are made for batches up to {most_rows}, but --batch is {max(request.batch)}")
    if request.seq and max(request.seq) + NEW_TOKENS > capacity:
        raise InputError(
            f"the bundles are made for {capacity} tokens, but --seq {max(request.seq)} plus {NEW_TOKENS} new ones is "
            f"longer; give up to {capacity - NEW_TOKENS}"
        )
    if capacity <= NEW_TOKENS:
        raise InputError(
            f"the bundles are made for {capacity} tokens, but {NEW_TOKENS} are decoded; export for longer sequences"
        )
    usual: dict[What, tuple[int, ...]] = {"prefill": _PROMPTS, "decode": _PASTS}
    most = capacity - NEW_TOKENS
    return tuple(
        ModelSize(what=what, batch_size=batch_size, length=length)
        for what, lengths in usual.items()
        for batch_size in sorted(set(request.batch))
        for length in sorted(set(request.seq or [length for length in lengths if length <= most] or [most]))
    )


def _baseline(given: str | None, candidates: Sequence[ModelCandidate]) -> str:
    """The requested baseline, else transformers' usual attention, else the eager model, else the first candidate."""
    ranked = sorted(candidates, key=lambda each: ("transformers", "eager", "bundle").index(each.kind))
    return choose_baseline(given, ranked)


def _described(config: DecoderConfig, source: str) -> Model:
    block = config.attention
    return Model(
        source=source,
        num_layers=config.num_layers,
        embed_dim=config.embed_dim,
        vocab_size=config.vocab_size,
        num_heads=block.num_heads,
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        num_parameters=sum(prod(shape) for shape in config.weight_shapes().values()),
    )
