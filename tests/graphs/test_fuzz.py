"""Graphs and inputs that nobody wrote on purpose: what a graph declares is accepted, and anything else refused."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.graphs import GraphSpec, graph_spec
from diffdeploy.runtime.inputs import as_integers, check_inputs
from tests.support.blocks import ROPE, make_config
from tests.support.fuzzing import fuzzed
from tests.support.models import make_decoder

BLOCKS = [make_config(), make_config(rope=ROPE), make_config(num_heads=6, num_kv_heads=2, head_dim=2)]
MODELS = [make_decoder(num_layers=1), make_decoder(num_layers=3, attention=make_config(rope=None))]


@st.composite
def specs(draw: st.DrawFn) -> GraphSpec:
    variant: Any = draw(st.sampled_from(["plain", "masked", "cached", "model"]))
    is_model = variant == "model"
    configs: list[Any] = [*(MODELS if is_model else BLOCKS)]
    return graph_spec(
        variant,
        draw(st.sampled_from(configs)),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        max_batch_size=draw(st.integers(2, 6)),
        max_sequence_length=draw(st.integers(4, 12)),
        logits=draw(st.sampled_from(["all", "last"])) if is_model else "all",
        cache=draw(st.sampled_from(["growing", "in-place"])) if is_model else "growing",
    )


def right_inputs(spec: GraphSpec, draw: Callable[..., Any]) -> dict[str, Array]:
    """Zeros of sizes that the graph declares."""
    longest = spec.axes["sequence_length"].max
    length = draw(st.integers(1, longest))
    past = draw(st.integers(0, longest - length)) if spec.sums else 0
    sizes = {"batch_size": draw(st.integers(1, spec.axes["batch_size"].max)), "sequence_length": length}
    sizes |= {"past_sequence_length": past, "total_sequence_length": past + length}
    shapes = {n: [size if isinstance(size, int) else sizes[size] for size in t.shape] for n, t in spec.inputs.items()}
    return {name: np.zeros(shapes[name], tensor.dtype) for name, tensor in spec.inputs.items()}


anything = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype),
        st.lists(st.integers(0, 5), max_size=5),
        st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.bool_, np.complex64, "U3"]),
    ),
)


@fuzzed
@given(st.data())
def test_what_is_declared_is_accepted(data: st.DataObject) -> None:
    spec = data.draw(specs())
    check_inputs(spec, right_inputs(spec, data.draw))


@fuzzed
@given(st.data())
def test_one_wrong_tensor_is_refused(data: st.DataObject) -> None:
    spec = data.draw(specs())
    inputs: dict[str, Any] = dict(right_inputs(spec, data.draw))
    name = data.draw(st.sampled_from(list(inputs)))
    wrong = data.draw(anything)
    right = inputs[name]
    same = isinstance(wrong, np.ndarray) and (wrong.dtype, wrong.shape) == (right.dtype, right.shape)
    # One size of the batch or of a plain sequence is as good as another, if no other input has it.
    alone = len(inputs) == 1 and isinstance(wrong, np.ndarray) and wrong.dtype == right.dtype
    assume(not same and not alone)
    inputs[name] = wrong
    with pytest.raises(InputError):
        check_inputs(spec, inputs)


@fuzzed
@given(st.data())
def test_whatever_is_given_is_accepted_or_refused_as_input(data: st.DataObject) -> None:
    spec = data.draw(specs())
    names = st.one_of(st.sampled_from(list(spec.inputs)), st.text(max_size=4))
    inputs = data.draw(st.dictionaries(names, anything, max_size=6))
    if data.draw(st.booleans()):
        inputs = {name: data.draw(anything) for name in spec.inputs}
    with suppress(InputError):
        check_inputs(spec, as_integers(spec, inputs))


@fuzzed
@given(specs())
def test_a_graph_is_what_its_manifest_says(spec: GraphSpec) -> None:
    assert GraphSpec.model_validate_json(spec.model_dump_json()) == spec
    for graph in (spec, spec.of_artifact()):
        named = {axis for t in (*graph.inputs.values(), *graph.outputs.values()) for axis in t.shape} - {1}
        assert {axis for axis in named if isinstance(axis, str)} <= graph.axes.keys()
        assert set(graph.sums) <= graph.axes.keys()
    assert list(spec.of_artifact().inputs) == list(spec.inputs)
    assert {name.replace("past_key_values.", "present.") for name in spec.caches} == set(spec.caches.values())
