"""The choice of candidates: names are checked, and candidates that cannot run here are refused or left out."""

from collections.abc import Iterable, Sequence

from diffdeploy.bench.block_source import BlockSource
from diffdeploy.bench.models.plan import ModelCandidate
from diffdeploy.bench.plan import SOFTMAX_BLOCKS, SOFTMAX_COMPILED, Candidate, Size
from diffdeploy.bundle import Bundle
from diffdeploy.config import AnyConfig
from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.formats import RunOptions
from diffdeploy.graphs import DType
from diffdeploy.ops import Impl
from diffdeploy.ops.registry import implementation
from diffdeploy.ops.request import Request
from diffdeploy.runtime import require_runnable, require_trusted
from diffdeploy.toolchain import why_not_compile

__all__ = ["choose_baseline", "choose_names", "eager_candidates", "given_candidates"]

_NAIVE = Impl.NAIVE.value
# `auto` follows the implementations from which it chooses.
_EAGER = (*(impl.value for impl in Impl if impl != Impl.AUTO), Impl.AUTO.value, *SOFTMAX_BLOCKS)


def choose_names(what: str, given: Sequence[str], accepted: Iterable[str]) -> list[str]:
    """Resolve the requested names: ``all``, ``none``, or some of the accepted ones.

    Args:
        what: kind of name, for the error.
        given: requested names.
        accepted: accepted names, in order.

    Raises:
        InputError: a name is unknown.
    """
    accepted = list(accepted)
    if list(given) == ["none"]:
        return []
    if list(given) == ["all"]:
        return accepted
    for name in given:
        if name not in accepted:
            raise InputError(f"{what} {name!r} is not known; accepted: {', '.join(accepted)}, all or none")
    return list(dict.fromkeys(given))


def eager_candidates(given: Sequence[str], config: AnyConfig, *, device: str, dtype: DType) -> list[Candidate]:
    """Candidates for the implementations of the eager block and the plain softmax block.

    Args:
        given: names; ``all`` leaves out those that cannot run.
        config: config of the block.
        device: ``cpu`` or ``cuda``.
        dtype: dtype of the run.

    Raises:
        InputError: a name is unknown, or the block or the dtype does not support it.
        UnavailableError: an implementation cannot run here.
    """
    names = choose_names("implementation", given, _EAGER)
    candidates = []
    for name in names:
        try:
            _require_runnable_impl(name, config, device, dtype)
        except DiffDeployError:
            if list(given) != ["all"]:
                raise
            continue
        candidates.append(Candidate.of_impl(name))
    return candidates


def _require_runnable_impl(name: str, config: AnyConfig, device: str, dtype: DType) -> None:
    if name in SOFTMAX_BLOCKS and config.streams_share_keys:
        raise InputError("softmax can be compared only with blocks of the first version, but this one is of the second")
    if name in SOFTMAX_BLOCKS and config.value_dim != 2 * config.head_dim:
        raise InputError(
            f"softmax can be compared only with blocks whose values are {2 * config.head_dim} wide, twice the width of "
            f"a stream, but in this block they are {config.value_dim} wide"
        )
    if name == SOFTMAX_COMPILED and (missing := why_not_compile()):
        raise UnavailableError(f"{name} {missing}")
    if name not in (*SOFTMAX_BLOCKS, Impl.AUTO):
        reason = implementation(Impl(name)).why_not(_one_token(config, device, dtype))
        if reason is not None:
            raise reason


def _one_token(config: AnyConfig, device: str, dtype: DType) -> Request:
    """A request with the widths of a block."""
    import torch

    sides = (
        (2 * config.num_heads, config.head_dim),
        (config.num_key_streams, config.head_dim),
        (config.num_kv_heads, config.value_dim),
    )
    q, k, v = (torch.empty(1, heads, 1, width, dtype=getattr(torch, dtype), device=device) for heads, width in sides)
    return Request.of(q, k, v, torch.zeros(()), causal=config.causal)


def given_candidates(subject: BlockSource, sizes: Sequence[Size], options: RunOptions) -> list[Candidate]:
    """Candidates for the given bundles.

    Raises:
        InputError: a size is outside the ranges of a bundle.
        IntegrityError: a bundle runs code and is not trusted.
        UnavailableError: a bundle cannot be run here.
    """
    candidates = []
    for bundle, name in zip(subject.bundles, subject.names, strict=True):
        require_runnable(bundle.manifest, options)
        require_trusted(bundle, options)
        for size in sizes:
            _require_range(bundle, name, size)
        candidates.append(Candidate.of_bundle(name, bundle.path))
    return candidates


def _require_range(bundle: Bundle, name: str, size: Size) -> None:
    axes = bundle.manifest.graph.axes
    # With a cache, the range covers the past and the new token together.
    length = "total_sequence_length" if "total_sequence_length" in axes else "sequence_length"
    for option, axis, given in (
        ("--batch", "batch_size", size.batch_size),
        ("--seq", length, size.total_sequence_length),
    ):
        most = axes[axis].max
        if given > most:
            raise InputError(f"bundle {name} is made for {axis} up to {most}, but {option} needs {given}")


def choose_baseline(given: str | None, candidates: Sequence[Candidate] | Sequence[ModelCandidate]) -> str:
    """Name of the candidate that ratios refer to: the requested one, else ``naive``, else the first one.

    Raises:
        InputError: there is no such candidate, no candidate at all, or two of the same name.
    """
    names = [candidate.name for candidate in candidates]
    if not names:
        raise InputError("there is nothing to measure; give --impl, --format or a bundle")
    for name in names:
        # Samples, verdicts and rows are identified by name.
        if names.count(name) > 1:
            raise InputError(f"two candidates are called {name}; rename the bundle, or omit it from --format")
    if given is None:
        return _NAIVE if _NAIVE in names else names[0]
    if given not in names:
        raise InputError(f"baseline {given!r} is not among the candidates; accepted: {', '.join(names)}")
    return given
