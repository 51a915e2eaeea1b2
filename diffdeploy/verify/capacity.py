"""Check that sequences longer than a model's capacity are refused, and never wrapped or truncated."""

from collections.abc import Callable
from math import prod

import numpy as np

from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.formats import Check
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case
from diffdeploy.verify.worker import Artifact

__all__ = ["capacity_check"]

# Maximum number of elements in a full cache that is created only for a call that must be refused: 64 MiB in fp32.
_MAX_CACHED = 2**24


def capacity_check(artifact: Artifact, spec: GraphSpec, seed: int) -> Check:
    """Try one token more than the capacity: in a prompt, after a full cache, and as the last token to generate.

    Args:
        artifact: object that runs a model.
        spec: interface of its graph.
        seed: random seed for the tokens.
    """
    capacity = spec.axes["total_sequence_length"].max
    prompt = _inputs(spec, seed, capacity, 0)
    tried: dict[str, Callable[[], object]] = {
        f"a prompt of {capacity} tokens and 2 new ones": lambda: artifact.generate(prompt, 2),
        f"{capacity + 1} tokens in one call": lambda: artifact.run(_inputs(spec, seed, capacity + 1, 0)),
    }
    of_token = sum(prod(size for size in spec.inputs[name].shape if isinstance(size, int)) for name in spec.caches)
    if of_token * capacity <= _MAX_CACHED:
        behind = f"a token after {capacity} in the cache"
        tried[behind] = lambda: artifact.run(_inputs(spec, seed, 1, capacity))
    problems = [f"{what}: {problem}" for what, call in tried.items() if (problem := _not_refused(call))]
    detail = "; ".join(problems) or f"more than {capacity} tokens are refused ({len(tried)} ways)"
    return Check(name="capacity", passed=not problems, detail=detail)


def _inputs(spec: GraphSpec, seed: int, length: int, past_length: int) -> dict[str, np.ndarray]:
    inputs = Case(batch_size=1, sequence_length=length, past_length=past_length, seed=seed).inputs(spec)
    if "position_ids" in inputs:
        # Positions must be valid, so that the length is the reason for the refusal.
        inputs["position_ids"] = np.minimum(inputs["position_ids"], spec.axes["total_sequence_length"].max - 1)
    return inputs


def _not_refused(call: Callable[[], object]) -> str | None:
    """Description of what happened instead of a refusal; ``None`` if the call was refused."""
    try:
        call()
    except DiffDeployError as error:
        # Compared by name, since the artifact runs in its own process, which returns the error as text.
        return None if str(error).startswith(InputError.__name__) else f"it failed, {error}"
    return "it was computed"
