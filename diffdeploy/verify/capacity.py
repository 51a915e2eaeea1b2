"""Sequences that are longer than what a model was exported for must be refused, and never wrapped or cut."""

from collections.abc import Callable
from math import prod

import numpy as np

from diffdeploy.errors import DiffDeployError, InputError
from diffdeploy.formats import Check
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case
from diffdeploy.verify.worker import Artifact

__all__ = ["capacity_check"]

# Numbers in a cache of that length that is made to be refused: 64 MiB in fp32.
_MAX_CACHED = 2**24


def capacity_check(artifact: Artifact, spec: GraphSpec, seed: int) -> Check:
    """One token more than the capacity: in a prompt, behind a past, and as the last one that is to come.

    Args:
        artifact: runs a model.
        spec: interface of its graph.
        seed: of the tokens.
    """
    capacity = spec.axes["total_sequence_length"].max
    prompt = _inputs(spec, seed, capacity, 0)
    tried: dict[str, Callable[[], object]] = {
        f"a prompt of {capacity} tokens, and 2 to come": lambda: artifact.generate(prompt, 2),
        f"{capacity + 1} tokens in one call": lambda: artifact.run(_inputs(spec, seed, capacity + 1, 0)),
    }
    of_token = sum(prod(size for size in spec.inputs[name].shape if isinstance(size, int)) for name in spec.caches)
    if of_token * capacity <= _MAX_CACHED:
        behind = f"a token behind {capacity} in the cache"
        tried[behind] = lambda: artifact.run(_inputs(spec, seed, 1, capacity))
    problems = [f"{what}: {problem}" for what, call in tried.items() if (problem := _not_refused(call))]
    detail = "; ".join(problems) or f"more than {capacity} tokens are refused ({len(tried)} ways)"
    return Check(name="capacity", passed=not problems, detail=detail)


def _inputs(spec: GraphSpec, seed: int, length: int, past_length: int) -> dict[str, np.ndarray]:
    inputs = Case(batch_size=1, sequence_length=length, past_length=past_length, seed=seed).inputs(spec)
    if "position_ids" in inputs:
        # What is refused must be the length, and no position.
        inputs["position_ids"] = np.minimum(inputs["position_ids"], spec.axes["total_sequence_length"].max - 1)
    return inputs


def _not_refused(call: Callable[[], object]) -> str | None:
    """What happened in place of a refusal; ``None`` where it is one."""
    try:
        call()
    except DiffDeployError as error:
        # By its name: the artifact runs in a process of its own, which says what was raised there.
        return None if str(error).startswith(InputError.__name__) else f"it failed, {error}"
    return "it was computed"
