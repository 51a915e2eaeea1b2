"""Feeding a case to an artifact: in one call, in steps that pass on the cache, or one row at a time."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import AnyCase
from diffdeploy.verify.worker import Artifact

__all__ = ["start"]


def start(
    case: AnyCase, artifact: Artifact, inputs: Mapping[str, Array], spec: GraphSpec
) -> Callable[[], dict[str, Array]]:
    """Start a case without waiting; one that consists of several calls starts when its outputs are requested.

    Returns:
        Function that waits for the outputs of all calls and joins them, by name. It raises ExportError if the artifact
        did not run, and holds no inputs of a single call.
    """
    if case.chunks:
        return partial(_in_chunks, case.chunks, artifact, inputs, spec)
    if case.row_by_row:
        return partial(_row_by_row, artifact, inputs)
    if case.decoded:
        return partial(_decoded, case.decoded, artifact, inputs, spec)
    artifact.start(inputs)
    return artifact.result


def _in_chunks(
    chunks: tuple[int, ...], artifact: Artifact, inputs: Mapping[str, Array], spec: GraphSpec
) -> dict[str, Array]:
    caches = {name: inputs[name] for name in spec.caches}
    outputs: list[Array] = []
    done = 0
    for chunk in chunks:
        part = {
            name: inputs[name][:, done : done + chunk] for name in (spec.main_input, "position_ids") if name in inputs
        }
        # The mask grows with the cache, since it covers all tokens so far.
        part["attention_mask"] = inputs["attention_mask"][:, : done + chunk]
        result = artifact.run({**part, **caches})
        caches = {name: result[present] for name, present in spec.caches.items()}
        outputs.append(result[spec.main_output])
        done += chunk
    whole = outputs[-1] if spec.logits == "last" else np.concatenate(outputs, axis=1)
    return {spec.main_output: whole, **{spec.caches[name]: array for name, array in caches.items()}}


def _decoded(num_tokens: int, artifact: Artifact, inputs: Mapping[str, Array], spec: GraphSpec) -> dict[str, Array]:
    """Logits of the last tokens and the caches, as in generation; tokens before those are fed in one call."""
    outputs, found = artifact.run(inputs), artifact.decode(inputs, num_tokens)
    logits = found.pop(spec.main_output)[:, -outputs[spec.main_output].shape[1] :]
    outputs[spec.main_output][:, -logits.shape[1] :] = logits
    return {**outputs, **found}


def _row_by_row(artifact: Artifact, inputs: Mapping[str, Array]) -> dict[str, Array]:
    rows = [
        artifact.run({name: array[row : row + 1] for name, array in inputs.items()})
        for row in range(len(next(iter(inputs.values()))))
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
