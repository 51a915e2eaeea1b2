"""Cached bundles of earlier versions, whose cache holds the key streams apart: they run, and cannot be verified."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffdeploy import load
from diffdeploy.bundle import WEIGHTS, open_bundle, write_manifest
from diffdeploy.errors import InputError
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.exporters.pt2 import lower
from diffdeploy.graphs import GraphSpec, TensorSpec
from diffdeploy.modules import DiffAttention, KeyValueCache
from diffdeploy.ops.heads import pair_streams, separate_streams
from diffdeploy.verify import verify_bundle
from tests.support.blocks import checkpoint_of, make_config

CONFIG = make_config()
SHAPES = {"past_key_values.key": (4, "past_sequence_length", 6), "present.key": (4, "total_sequence_length", 6)}


class Apart(DiffAttention):
    """Takes and gives its keys as ``[B, 2 h_kv, T, d]``."""

    def forward(self, hidden_states: Tensor, mask: Any = None, positions: Any = None, past: Any = None) -> Any:
        output, cache = super().forward(hidden_states, mask, positions, (pair_streams(past[0]), past[1]))
        return output, (separate_streams(cache[0]), cache[1])


@pytest.fixture(scope="module")
def old_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "bundle"
    options = ExportOptions(format="pt2", graph="cached", max_batch_size=4, max_sequence_length=30)
    export_bundle(checkpoint_of(CONFIG), path, options, verify=False)
    bundle = open_bundle(path)
    spec = _apart(bundle.manifest.graph)
    weights = {name: tensor.float() for name, tensor in checkpoint_of(CONFIG).weights.items()}
    lower(Apart.from_weights(CONFIG, weights, impl="two_call", max_positions=30), spec, path)
    write_manifest(path, bundle.manifest.model_copy(update={"graph": spec}))
    assert WEIGHTS in open_bundle(path).manifest.files
    return path


def _apart(spec: GraphSpec) -> GraphSpec:
    def old(tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {
            name: tensor.model_copy(update={"shape": ("batch_size", *SHAPES[name])}) if name in SHAPES else tensor
            for name, tensor in tensors.items()
        }

    return spec.model_copy(update={"inputs": old(spec.inputs), "outputs": old(spec.outputs)})


def test_they_run_as_their_manifest_says(old_bundle: Path) -> None:
    weights = checkpoint_of(CONFIG).weights
    block = DiffAttention.from_weights(CONFIG, weights, max_positions=30)
    x, mask = torch.randn(2, 3, 24), torch.ones(2, 7, dtype=torch.int64)
    positions = torch.arange(4, 7).repeat(2, 1)
    key, value = torch.randn(2, 4, 4, 6), torch.randn(2, 2, 4, 12)
    past = {"past_key_values.key": key, "past_key_values.value": value}
    outputs = load(old_bundle)(hidden_states=x, attention_mask=mask, position_ids=positions, **past)
    output, cache = block(x, mask, positions, (pair_streams(key), value))
    torch.testing.assert_close(outputs["output"], output, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair_streams(outputs["present.key"]), cache[0], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"past_key_values.key has shape .* accepted: \['batch_size', 4, "):
        load(old_bundle)(
            hidden_states=x,
            attention_mask=mask,
            position_ids=positions,
            **{**past, "past_key_values.key": pair_streams(key)},
        )


def test_they_cannot_be_verified(old_bundle: Path) -> None:
    message = "a cache of separate key streams, 4 heads of width 6, but verification needs 2 of 12; export it again"
    with pytest.raises(InputError, match=message):
        verify_bundle(old_bundle)


def test_the_cache_of_shared_keys_is_as_it_was(tmp_path: Path) -> None:
    """Bundles of the second version, and those without a cache, are not refused."""
    from tests.support.blocks import EXPORT_CONFIGS

    options = ExportOptions(format="pt2", graph="cached", max_batch_size=2, max_sequence_length=8, cases="quick")
    done = export_bundle(checkpoint_of(EXPORT_CONFIGS["v2"]), tmp_path / "out", options)
    assert done.report is not None
    assert done.report.passed


def test_a_past_of_separate_streams_is_refused_by_the_block() -> None:
    past: KeyValueCache = (torch.zeros(1, 4, 3, 6), torch.zeros(1, 2, 3, 12))
    block = DiffAttention(CONFIG)
    with pytest.raises(InputError, match=r"past key has shape \[1, 4, 3, 6\]; accepted: \[1, 2, 'P', 12\]"):
        block(torch.zeros(1, 1, 24), torch.ones(1, 4, dtype=torch.int64), None, past)
