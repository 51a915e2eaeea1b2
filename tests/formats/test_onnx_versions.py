"""The table of the least onnxruntime: what it says of graphs, and that the version we ask for satisfies all rows."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffdeploy.bundle import Manifest, Quantisation, open_bundle
from diffdeploy.config import DiffAttentionConfig
from diffdeploy.formats import find_format
from diffdeploy.formats.onnx.versions import _TABLE, least_onnxruntime
from diffdeploy.graphs import graph_spec
from diffdeploy.versions import release
from tests.support.blocks import ROPE, make_config
from tests.support.models import make_decoder
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def manifest(sample_bundle: Path) -> Manifest:
    """Of a block with 4 heads and 2 key/value heads, without a window: plain, float32, opset 23."""
    return open_bundle(sample_bundle).manifest


def changed(
    manifest: Manifest, *, kv_heads: int = 2, window: int | None = None, masked: bool = False, **options: Any
) -> Manifest:
    graph = graph_spec(
        "masked" if masked else "plain", manifest.config, dtype="float32", max_batch_size=4, max_sequence_length=16
    )
    assert isinstance(manifest.config, DiffAttentionConfig)
    config = replace(manifest.config, num_kv_heads=kv_heads, sliding_window=window)
    recorded = manifest.options.model_copy(update=options)
    return manifest.model_copy(update={"graph": graph, "config": config, "options": recorded})


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"opset": 18}, "1.19.0"),
        ({"opset": 20}, "1.19.0"),
        ({"opset": 21}, "1.19.0"),
        ({"opset": 22}, "1.21.0"),
        ({"opset": 23}, "1.23.1"),
        ({"opset": 24}, "1.24.1"),
        # 1.23.0 has the wrong heads only where there are fewer of keys and values.
        ({"opset": 23, "kv_heads": 4}, "1.23.0"),
        # The window of the standard flavor is in its mask.
        ({"opset": 20, "window": 3}, "1.19.0"),
        ({"opset": 20, "flavor": "ort"}, "1.19.0"),
        ({"opset": 20, "flavor": "ort", "masked": True}, "1.22.0"),
        ({"opset": 20, "flavor": "ort", "window": 3}, "1.24.1"),
        ({"opset": 23, "flavor": "ort"}, "1.23.0"),
        ({"opset": 23, "flavor": "ort", "masked": True}, "1.23.0"),
        ({"opset": 23, "flavor": "ort", "window": 3}, "1.24.1"),
        ({"opset": 24, "flavor": "ort"}, "1.24.1"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_rows(changes: dict[str, Any], least: str, manifest: Manifest) -> None:
    assert least_onnxruntime(changed(manifest, **changes)) == least
    found = find_format("onnx")
    assert found is not None
    assert found.least_versions(changed(manifest, **changes)) == {"onnxruntime": least}


@pytest.mark.parametrize(("window", "least"), [(None, "1.23.0"), (3, "1.24.1")])
def test_any_layer_of_a_model_counts(window: int | None, least: str, manifest: Manifest) -> None:
    model = make_decoder(num_layers=2, attention=make_config(num_kv_heads=2, rope=ROPE))
    last = model.layers[-1]
    windowed = replace(last, attention=replace(last.attention, sliding_window=window))
    model = replace(model, layers=(*model.layers[:-1], windowed))
    options = manifest.options.model_copy(update={"flavor": "ort"})

    assert least_onnxruntime(manifest.model_copy(update={"config": model, "options": options})) == least


@pytest.mark.parametrize(("weights", "least"), [("int4", "1.19.0"), ("int8", "1.23.0")])
def test_quantised_matrices(weights: Any, least: str, manifest: Manifest) -> None:
    quantised = changed(manifest, opset=20, flavor="ort", quantisation=Quantisation(weights=weights))
    assert least_onnxruntime(quantised) == least


def test_every_graph_runs_on_the_oldest_version_that_the_extra_brings() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, name in (("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")):
        (requirement,) = (text for text in extras[extra] if text.startswith(name))
        bound = release(requirement.removeprefix(f"{name}>="))
        assert bound == max(release(row.least) for row in _TABLE)
