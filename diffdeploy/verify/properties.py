"""Relations between an artifact's outputs: those that do not depend on a changed input must stay bit-identical.

Two runs of equal shapes do the same operations on the same numbers wherever the changed part of the input is not read,
or has a weight of exactly 0, so a difference of one bit is a finding. Runs of different shapes may use
different kernels, so batch and cache equivalence across shapes are tested by cases that are compared with the exact
result.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from diffdeploy.arrays import Array
from diffdeploy.config import AnyModel
from diffdeploy.errors import DiffDeployError
from diffdeploy.formats import Check
from diffdeploy.graphs import GraphSpec
from diffdeploy.verify.cases import Case, Mask
from diffdeploy.verify.worker import Artifact

__all__ = ["property_checks"]

# One token, as in decoding, and lengths that leave a remainder in the blocks of every kernel.
_LENGTHS = (1, 7, 65)
_PADDINGS: tuple[Mask, ...] = ("left", "right", "ragged", "mixed")
_REPETITIONS = 3

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class _Pair:
    """Two inputs, and the parts of their outputs that must be equal.

    Attributes:
        name: name of the pair, for the report.
        inputs: the first input.
        changed: the second input.
        kept: boolean arrays by output, ``True`` where outputs must be bit-identical; broadcastable to the output's
            ``[B, T]``, where ``T`` is its axis of positions.
    """

    name: str
    inputs: Arrays
    changed: Arrays
    kept: dict[str, Array]


def property_checks(artifact: Artifact, config: AnyModel, spec: GraphSpec, seed: int) -> list[Check]:
    """Check determinism, batch invariance and, where they apply, causality, padding invariance and cache pass-through.

    Args:
        artifact: object that runs the artifact.
        config: config of the block.
        spec: interface of the graph.
        seed: random seed for the inputs.
    """
    checks = [
        _check("determinism", artifact, _determinism(spec, seed), "bit-identical outputs for the same input"),
        _check(
            "batch invariance", artifact, _other_rows(spec, seed), "rows are bit-identical, regardless of other rows"
        ),
    ]
    if spec.main_input == "hidden_states":  # tokens cannot be NaN
        checks.append(_nan_stays_in_its_row(artifact, spec, seed))
    if config.attention.causal:
        checks.append(
            _check(
                "causality", artifact, _later_tokens(spec, seed), "bit-identical outputs, regardless of later tokens"
            ),
        )
    if spec.variant != "plain":
        checks.append(
            _check(
                "padding invariance", artifact, _padding(spec, seed), "bit-identical outputs, regardless of the padding"
            ),
        )
    if spec.caches:
        checks.append(_cache_is_handed_on(artifact, spec, seed))
    return checks


def _check(name: str, artifact: Artifact, pairs: Iterator[_Pair], fine: str) -> Check:
    num_pairs, base, one = 0, None, {}
    for pair in pairs:
        num_pairs += 1
        try:
            # Pairs of one case share their first input, which is run once.
            if base is not pair.inputs:
                base, one = pair.inputs, artifact.run(pair.inputs)
            other = artifact.run(pair.changed)
        except DiffDeployError as error:
            return Check(name=name, passed=False, detail=f"{pair.name}: the artifact did not run: {error}")
        for output, kept in pair.kept.items():
            if difference := _difference(one[output], other[output], kept):
                return Check(name=name, passed=False, detail=f"{pair.name}: {output} changed, {difference}")
    return Check(name=name, passed=True, detail=f"{fine} ({num_pairs} pairs of runs)")


def _difference(one: Array, other: Array, kept: Array) -> str | None:
    """Describe the first forbidden difference between two outputs, with ``kept`` as in `_Pair`."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"from {one.dtype} {list(one.shape)} to {other.dtype} {list(other.shape)}"
    # Compared as bits, since NaN equals nothing, and 0 equals -0.
    bits = f"u{one.dtype.itemsize}"
    wide = kept[:, :, None] if one.ndim == 3 else kept[:, None, :, None]
    differs = (np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(other).view(bits)) & wide
    if not differs.any():
        return None
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    return f"first at {list(first)} from {float(one[first]):.6g} to {float(other[first]):.6g}"


def _base(spec: GraphSpec, seed: int, length: int, mask: Mask = "none") -> Case:
    total = spec.axes["sequence_length"].max
    past = min(5, total - length) if spec.caches else 0
    return Case(
        batch_size=min(3, spec.axes["batch_size"].max), sequence_length=length, past_length=past, mask=mask, seed=seed
    )


def _bases(spec: GraphSpec, seed: int, mask: Mask | None = None) -> Iterator[tuple[Case, Arrays, Arrays]]:
    """Cases with their inputs and other inputs of the same shapes; by default every row has its own mask."""
    mask = mask or ("none" if spec.variant == "plain" else "mixed")
    for length in _LENGTHS:
        if length <= spec.axes["sequence_length"].max:
            case = _base(spec, seed, length, mask)
            # Large numbers, so that a trace of them is not lost in rounding.
            yield case, case.inputs(spec), replace(case, kind="large", number=1).inputs(spec)


def _everywhere(spec: GraphSpec, kept: Array, past_length: int) -> dict[str, Array]:
    """Expand ``kept [B, P + S]`` to all outputs; ``output`` has no past."""
    new = kept[:, past_length:]
    if spec.variant == "model" and spec.logits == "last":
        new = new[:, -1:]
    return {name: new if name == spec.main_output else kept for name in spec.outputs}


def _determinism(spec: GraphSpec, seed: int) -> Iterator[_Pair]:
    for case, inputs, _ in _bases(spec, seed):
        kept = np.ones((case.batch_size, case.past_length + case.sequence_length), dtype=bool)
        for _ in range(_REPETITIONS):
            yield _Pair(case.id, inputs, inputs, _everywhere(spec, kept, case.past_length))


def _other_rows(spec: GraphSpec, seed: int) -> Iterator[_Pair]:
    for case, inputs, others in _bases(spec, seed):
        for row in (0, case.batch_size - 1):
            changed = {name: array.copy() for name, array in others.items()}
            for name, array in inputs.items():
                changed[name][row] = array[row]
            kept = np.zeros((case.batch_size, case.past_length + case.sequence_length), dtype=bool)
            kept[row] = True
            yield _Pair(f"{case.id}, row {row}", inputs, changed, _everywhere(spec, kept, case.past_length))


def _later_tokens(spec: GraphSpec, seed: int) -> Iterator[_Pair]:
    for case, inputs, others in _bases(spec, seed):
        length = case.sequence_length
        # The change begins right after the first token, in the middle, or at the last token.
        for first in sorted({1, length // 2, length - 1} - {0, length}):
            changed = dict(inputs)
            changed[spec.main_input] = inputs[spec.main_input].copy()
            changed[spec.main_input][:, first:] = others[spec.main_input][:, first:]
            kept = np.arange(case.past_length + length)[None] < case.past_length + first
            name = f"{case.id}, tokens from {first} on"
            yield _Pair(name, inputs, changed, _everywhere(spec, kept, case.past_length))


def _padding(spec: GraphSpec, seed: int) -> Iterator[_Pair]:
    for mask in _PADDINGS:
        for case, inputs, others in _bases(spec, seed, mask):
            tokens, past = inputs["attention_mask"] == 1, case.past_length
            changed = dict(inputs)
            new = tokens[:, past:]
            wide = new.reshape(*new.shape, *[1] * (inputs[spec.main_input].ndim - new.ndim))
            changed[spec.main_input] = _where(wide, inputs, others, spec.main_input)
            for name in spec.caches:
                changed[name] = _where(tokens[:, None, :past, None], inputs, others, name)
            if "position_ids" in inputs:
                # The position of a padding token must not matter either.
                changed["position_ids"] = np.where(tokens[:, past:], inputs["position_ids"], 0)
            yield _Pair(case.id, inputs, changed, _everywhere(spec, tokens, past))


def _nan_stays_in_its_row(artifact: Artifact, spec: GraphSpec, seed: int) -> Check:
    """Check that a NaN token makes every output that depends on it NaN, and changes no other row of the batch."""
    name, case = "NaN", _base(spec, seed, min(7, spec.axes["sequence_length"].max))
    inputs = case.inputs(spec)
    token = case.sequence_length // 2
    changed = {**inputs, "hidden_states": inputs["hidden_states"].copy()}
    changed["hidden_states"][0, token] = np.nan
    try:
        one, other = artifact.run(inputs), artifact.run(changed)
    except DiffDeployError as error:
        return Check(name=name, passed=False, detail=f"{case.id}: the artifact did not run: {error}")
    kept = np.ones((case.batch_size, case.past_length + case.sequence_length), dtype=bool)
    kept[0] = False
    for output, where in _everywhere(spec, kept, case.past_length).items():
        if difference := _difference(one[output], other[output], where):
            detail = f"{case.id}, NaN in row 0: {output} of another row changed, {difference}"
            return Check(name=name, passed=False, detail=detail)
    if not np.isnan(other["output"][0, token:].astype(np.float32)).all():
        detail = f"{case.id}: NaN in row 0, position {token}, yields numbers where it is visible"
        return Check(name=name, passed=False, detail=detail)
    return Check(name=name, passed=True, detail="a NaN token affects only positions that see it, and no other row")


def _where(kept: Array, inputs: Arrays, others: Arrays, name: str) -> Array:
    return np.where(kept, inputs[name], others[name])


def _cache_is_handed_on(artifact: Artifact, spec: GraphSpec, seed: int) -> Check:
    name, case = "cache handed on", _base(spec, seed, 1)
    inputs = case.inputs(spec)
    try:
        outputs = artifact.run(inputs)
    except DiffDeployError as error:
        return Check(name=name, passed=False, detail=f"{case.id}: the artifact did not run: {error}")
    for name_in, name_out in spec.caches.items():
        past, present = inputs[name_in], outputs[name_out]
        kept = np.ones((case.batch_size, case.past_length), dtype=bool)
        if difference := _difference(past, present[:, :, : case.past_length], kept):
            return Check(name=name, passed=False, detail=f"{case.id}: the past of {name_out} changed, {difference}")
    return Check(name=name, passed=True, detail="the past is returned bit for bit")
