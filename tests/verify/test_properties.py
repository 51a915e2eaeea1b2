"""Properties of an artifact: each check passes on the block, and fails on one that breaks just that property."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy.arrays import Array, to_array, to_tensor
from diffdeploy.errors import ExportError
from diffdeploy.graphs import Variant, graph_spec, run_graph
from diffdeploy.modules import DiffAttention
from diffdeploy.verify.properties import property_checks
from diffdeploy.verify.worker import ArtifactProcess
from tests.support.blocks import make_config, random_weights

Outputs = dict[str, Array]
Fault = Callable[[Mapping[str, Array], Outputs], None]
ALL = ["determinism", "batch invariance", "NaN", "causality", "padding invariance", "cache handed on"]


class InProcess(ArtifactProcess):
    """The eager block in the place of an artifact, with a fault in what it gives."""

    def __init__(self, fault: Fault, config: Any) -> None:
        weights = {name: tensor.float() for name, tensor in random_weights(config).items()}
        self._block = DiffAttention.from_weights(config, weights, impl="two_call", max_positions=80)
        self._fault = fault

    def run(self, inputs: Mapping[str, Array]) -> Outputs:
        with torch.no_grad():
            tensors = run_graph(self._block, {name: to_tensor(array) for name, array in inputs.items()})
        outputs = {name: to_array(tensor).copy() for name, tensor in tensors.items()}
        self._fault(inputs, outputs)
        return outputs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these blocks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    pass


class Nondeterministic:
    """One number in one of many calls is one step off."""

    __name__ = "nondeterministic"

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, inputs: Mapping[str, Array], outputs: Outputs) -> None:
        self._calls += 1
        if self._calls == 6:
            outputs["output"][0, -1, 3] = np.nextafter(outputs["output"][0, -1, 3], np.float32(np.inf))


def rows_leak(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    outputs["output"][0] += 1e-6 * inputs["hidden_states"][1:, :1].mean()


def the_future_leaks(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    x = inputs["hidden_states"]
    outputs["output"][:, :-1] += 1e-6 * x[:, -1:].mean(axis=2, keepdims=True)


def padding_leaks(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    past = inputs["attention_mask"].shape[1] - inputs["hidden_states"].shape[1]
    padding = inputs["attention_mask"][:, past:, None] == 0
    first = np.argmax(inputs["attention_mask"][:, past:] == 1, axis=1)
    rows = np.arange(len(first))
    # Only backwards, so that causality holds.
    before = np.arange(padding.shape[1])[None, :, None] < first[:, None, None]
    outputs["output"][rows, first] += 1e-6 * (inputs["hidden_states"] * (padding & before)).sum(axis=1)


def padding_in_the_cache_leaks(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    past = inputs["past_key_values.key"]
    padding = inputs["attention_mask"][:, None, : past.shape[2], None] == 0
    outputs["output"] += 1e-6 * (past * padding).sum(axis=(1, 2, 3))[:, None, None]


def the_cache_is_rounded(inputs: Mapping[str, Array], outputs: Outputs) -> None:
    for name in ("present.key", "present.value"):
        outputs[name] = outputs[name].astype(np.float16).astype(np.float32)


def broken(variant: Variant, fault: Fault, **changes: Any) -> list[str]:
    config = make_config(**changes)
    spec = graph_spec(variant, config, dtype="float32", max_batch_size=4, max_sequence_length=80)
    checks = property_checks(InProcess(fault, config), config, spec, seed=0)
    names = [name for name in ALL if name != "causality" or config.causal]
    assert [check.name for check in checks] == names[: {"plain": -2, "masked": -1, "cached": None}[variant]]
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("variant", ["plain", "masked", "cached"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_right_block_has_every_property(variant: Variant, causal: bool) -> None:
    assert broken(variant, right, causal=causal) == []


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Nondeterministic(), ["determinism"]),
        (rows_leak, ["batch invariance"]),
        (the_future_leaks, ["causality"]),
        (padding_leaks, ["padding invariance"]),
        (padding_in_the_cache_leaks, ["padding invariance"]),
        (the_cache_is_rounded, ["cache handed on"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.__name__,
)
def test_a_leak_below_every_budget_is_named(fault: Fault, expected: list[str]) -> None:
    assert set(expected) <= set(broken("cached", fault)) <= {*expected, "padding invariance", "NaN"}


def test_an_artifact_that_does_not_run_has_no_property() -> None:
    def dies(inputs: Mapping[str, Array], outputs: Outputs) -> None:
        raise ExportError("out of memory")

    assert broken("cached", dies) == ALL
