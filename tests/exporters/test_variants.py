"""Masked and cached graphs, the legacy key map and the second version through the whole export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffdeploy import load
from diffdeploy.checkpoints import Checkpoint
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.graphs import DType, Variant
from diffdeploy.modules import block_class
from tests.support.blocks import EXPORT_CONFIGS, checkpoint_of, make_config
from tests.support.bundles import BundleCache, options_of
from tests.support.pairwise import rest_is_slow


def options(graph: Variant, opset: int = 23, dtype: DType = "float32") -> ExportOptions:
    return replace(options_of("onnx"), graph=graph, opset=opset, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "graph", "opset", "dtype"),
    rest_is_slow(
        [
            ("legacy", "cached", 18, "float32"),
            ("window", "plain", 18, "float16"),
            ("full", "masked", 24, "float32"),
            ("v2", "masked", 20, "float16"),
            ("legacy", "plain", 23, "float32"),
            ("legacy-odd", "masked", 24, "float16"),
            ("window", "cached", 23, "float32"),
            ("full", "masked", 18, "float32"),
            ("full", "cached", 23, "float16"),
            ("v2", "plain", 23, "float32"),
            ("v2", "cached", 24, "float32"),
        ],
        quick=2,
    ),
    ids=str,
)
def test_exports_that_pass(name: str, graph: Variant, opset: int, dtype: DType, tmp_path: Path) -> None:
    done = export_bundle(checkpoint_of(EXPORT_CONFIGS[name]), tmp_path / "out", options(graph, opset, dtype))
    assert done.report is not None
    assert done.report.passed
    assert done.facts.attention_ops == 2


@pytest.mark.parametrize("name", rest_is_slow(["norm_eps", "qk_norm_eps"]))
def test_a_small_epsilon_is_not_left_out(name: str, tmp_path: Path) -> None:
    """The exporter's optimiser takes an addition of 1e-8 for one of 0, and rows of padding gave NaN."""
    config = make_config(**{name: 1e-10})
    done = export_bundle(checkpoint_of(config), tmp_path / "out", options("masked", 18))
    assert done.report is not None
    assert done.report.passed


@pytest.fixture(scope="module")
def cached_bundle(sample: Checkpoint, bundles: BundleCache) -> Path:
    return bundles.bundle(sample, options("cached"))


def test_generating_token_by_token_with_a_padded_prompt(sample: Checkpoint, cached_bundle: Path) -> None:
    runtime = load(cached_bundle)
    assert list(runtime.spec.inputs) == [
        "hidden_states",
        "attention_mask",
        "position_ids",
        "past_key_values.key",
        "past_key_values.value",
    ]
    assert list(runtime.spec.outputs) == ["output", "present.key", "present.value"]
    x = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    block = block_class(sample.config).from_weights(sample.config, sample.weights, max_positions=64)
    expected = block(x, mask, positions)
    past = {"past_key_values.key": torch.empty(2, 2, 0, 32), "past_key_values.value": torch.empty(2, 2, 0, 32)}
    outputs = []
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 12)]:
        result = runtime(
            hidden_states=x[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **past,
        )
        outputs.append(result["output"])
        past = {f"past_key_values.{side}": result[f"present.{side}"] for side in ("key", "value")}
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_mask": np.ones((1, 4), np.int64)},
            "total_sequence_length is 4; accepted: past_sequence_length 2",
        ),
        ({"attention_mask": np.full((1, 5), 2)}, "attention_mask holds numbers from 2 to 2; accepted: 0 to 1"),
        ({"position_ids": np.array([[0, 1, 70]])}, "position_ids holds numbers from 0 to 70; accepted: 0 to 69"),
        ({"past_key_values.key": np.zeros((1, 3, 2, 32), np.float32)}, "past_key_values.key has shape"),
        ({"hidden_states": np.zeros((2, 3, 128), np.float32)}, "batch_size is 1 in attention_mask, but 2 in another"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_inputs_are_refused(changes: dict[str, Any], message: str, cached_bundle: Path) -> None:
    good: dict[str, Any] = {
        "hidden_states": np.zeros((1, 3, 128), np.float32),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.array([[2, 3, 4]]),
        "past_key_values.key": np.zeros((1, 2, 2, 32), np.float32),
        "past_key_values.value": np.zeros((1, 2, 2, 32), np.float32),
    }
    runtime = load(cached_bundle)
    assert runtime(**good)["present.key"].shape == (1, 2, 5, 32)
    with pytest.raises(InputError, match=message):
        runtime(**{**good, **changes})


def test_a_cache_too_short_to_trace_is_refused(sample: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max sequence length is 3; accepted: 4 or more"):
        export_bundle(sample, tmp_path / "out", replace(options("cached"), max_sequence_length=3))


def test_masks_may_be_boolean(cached_bundle: Path) -> None:
    runtime = load(cached_bundle)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    others = {
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        **{f"past_key_values.{side}": torch.empty(2, 2, 0, 32) for side in ("key", "value")},
    }
    expected = runtime(hidden_states=x, attention_mask=mask, **others)["output"]
    torch.testing.assert_close(
        runtime(hidden_states=x, attention_mask=mask.bool(), **others)["output"], expected, rtol=0, atol=0
    )
    arrays = {name: tensor.numpy() for name, tensor in {"hidden_states": x, **others}.items()}
    given = runtime(attention_mask=mask.bool().numpy(), **arrays)["output"]
    np.testing.assert_array_equal(given, expected.numpy())
    with pytest.raises(InputError, match="position_ids has dtype bool"):
        runtime(hidden_states=x, attention_mask=mask, **{**others, "position_ids": mask.bool()})
